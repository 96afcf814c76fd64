"""Ahead-of-time compile of every kernel, with what it costs: registers, spills, shared memory. No GPU is needed.

    python -m fastgpt.kernels.aot                    every kernel for sm_80, sm_90 and sm_100
    python -m fastgpt.kernels.aot --arch 90 softmax  the kernels of one op for one architecture

The launchers themselves run, on meta tensors of real sizes, with a driver that compiles and never launches; so what is compiled
is what a user's call compiles: tile sizes, warps, stages, alignment. The machine code of each then says what it needs. The exit code
is 1 where a kernel spills registers to memory, asks for more shared memory than a block can have, or does not compile. It says
nothing about speed or results; the tests compare results in Triton's interpreter.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastgpt.kernels import (
    activation,
    adamw,
    attention,
    attention_backward,
    attention_decode,
    attention_tiles,
    bias_activation,
    cross_entropy,
    dropout,
    embedding,
    launch,
    layer_norm,
    log_softmax,
    rope,
    softmax,
    swiglu,
)

ARCHITECTURES = (80, 90, 100)  # compiled where nothing else is asked for
SHARED_LIMIT_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}  # of a block
HALF, HALF16, FULL = torch.bfloat16, torch.float16, torch.float32
DTYPES = (HALF, HALF16, FULL)
Calls = Iterator[tuple[str, Callable[[], Any]]]  # (what is called, the call)
NAMES = {HALF: "bf16", HALF16: "fp16", FULL: "fp32"}


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def softmax_calls() -> Calls:
    for dtype, cols in itertools.product(DTYPES, (65, 1024, 4096, 16384, 50304)):
        x, mask = meta(8, 12, 64, cols, dtype=dtype), meta(8, 1, 1, cols, dtype=FULL)
        for name, bias, is_causal in (("", None, False), (" causal", None, True), (" mask causal", mask, True)):
            yield f"{NAMES[dtype]} {cols}{name}", partial(softmax.softmax, x, bias, 0.125, is_causal)
        yield f"{NAMES[dtype]} {cols} backward", partial(softmax.softmax_backward, x, x, 0.125)


def activation_calls() -> Calls:
    for dtype, kind in itertools.product(DTYPES, activation.KINDS):
        x = meta(64, 1024, 3072, dtype=dtype)
        yield f"{NAMES[dtype]} {kind}", partial(activation.activation, kind, x)
        yield f"{NAMES[dtype]} {kind} backward", partial(activation.activation_backward, kind, x, x)


def attention_calls() -> Calls:
    """Grouped heads, every padded head size and one that is not a power of two; float32 exact and, at 64 and 128, in TF32."""
    sizes = [(dtype, "highest", dim) for dtype in (HALF, FULL) for dim in (16, 32, 64, 80, 128, 256)]
    sizes += [
        (dtype, precision, dim) for dtype, precision in ((HALF16, "highest"), (FULL, "high")) for dim in (64, 128)
    ]
    for (dtype, precision, dim), is_causal in itertools.product(sizes, (True, False)):
        what = f"{NAMES[dtype]}{' tf32' * (precision == 'high')} {dim}{' causal' * is_causal}"
        torch.set_float32_matmul_precision(precision)
        options = attention_tiles.Options(is_causal, 0.125)
        yield from attention_both(what, dtype, dim, options)
        q, k = meta(8, 12, 1, dim, dtype=dtype), meta(8, 4, 1024, dim, dtype=dtype)
        yield f"{what} decode", partial(attention.attention, q, k, k, options)
    torch.set_float32_matmul_precision("highest")


def attention_option_calls() -> Calls:
    """Windows, soft cap, dropout (with keys in fours and not), packed sequences; a decode step on a cache with all of its arguments."""
    seed, cu = meta(dtype=torch.int64), meta(9, dtype=torch.int32)
    for dtype, dim in (*itertools.product((HALF, FULL), (16, 32, 64, 80, 128, 256)), (HALF16, 64)):
        for name, is_causal, options in (
            ("window", True, {"window_left": 256}),
            ("window full", False, {"window_left": 256, "window_right": 64}),
            ("softcap", True, {"softcap": 30.0}),
            ("dropout", True, {"dropout_p": 0.1, "seed": seed}),
            ("packed", True, {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 1024, "max_seqlen_k": 1024}),
        ):
            made = attention_tiles.Options(is_causal, 0.125, **options)
            yield from attention_both(f"{NAMES[dtype]} {dim} {name}", dtype, dim, made)
            if name == "dropout":
                yield from attention_both(f"{NAMES[dtype]} {dim} dropout odd", dtype, dim, made, keys=1023)
        q, k, index = meta(8, 12, 2, dim, dtype=dtype), meta(8, 4, 1024, dim, dtype=dtype), meta(8, dtype=torch.int32)
        made = attention_tiles.Options(True, 0.125, window_left=256, softcap=30.0)
        call = partial(attention_decode.attention_decode, q, k, k, index, index, index, made)
        yield f"{NAMES[dtype]} {dim} cache window softcap", call


def attention_both(
    what: str, dtype: torch.dtype, dim: int, options: attention_tiles.Options, keys: int = 1024
) -> Calls:
    """Forward and backward of 12 heads over 4."""
    q, k, lse = meta(8, 12, 1024, dim, dtype=dtype), meta(8, 4, keys, dim, dtype=dtype), meta(8, 12, 1024, dtype=FULL)
    yield what, partial(attention.attention, q, k, k, options)
    yield f"{what} backward", partial(attention_backward.attention_backward, q, q, k, k, q, lse, options)


def cross_entropy_calls() -> Calls:
    for dtype, classes, smoothing in itertools.product(DTYPES, (65, 50304), (0.0, 0.1)):
        x, target, lse = (
            meta(8192, classes, dtype=dtype),
            meta(8192, dtype=torch.int64),
            meta(8192, dtype=torch.float64),
        )
        what, options = f"{NAMES[dtype]} {classes} smoothing {smoothing}", (-100, "mean", smoothing)
        yield what, partial(cross_entropy.cross_entropy, x, target, *options)
        yield (
            f"{what} backward",
            partial(cross_entropy.cross_entropy_backward, meta(dtype=FULL), x, target, lse, *options),
        )
        yield f"{what} z", partial(cross_entropy.cross_entropy, x, target, *options, 1e-4)
        call = partial(cross_entropy.cross_entropy_backward, meta(dtype=FULL), x, target, lse, *options, 1e-4)
        yield f"{what} z backward", call


def layer_norm_calls() -> Calls:
    for (dtype, params), cols in itertools.product(
        ((HALF, HALF), (HALF, FULL), (HALF16, HALF16), (FULL, FULL)), (96, 768, 4096, 8192, 12288)
    ):
        x, p, s = meta(8, 1024, cols, dtype=dtype), meta(cols, dtype=params), meta(8, 1024, dtype=FULL)
        what = f"{NAMES[dtype]} {NAMES[params]} {cols}"
        yield what, partial(layer_norm.layer_norm, x, p, p, 1e-5)
        yield f"{what} plain", partial(layer_norm.layer_norm, x, None, None, 1e-5)
        yield f"{what} backward", partial(layer_norm.layer_norm_backward, x, x, p, s, s, True)
        yield f"{what} rms", partial(layer_norm.rms_norm, x, p, 1e-5)
        yield f"{what} rms backward", partial(layer_norm.layer_norm_backward, x, x, p, None, s, True)
        yield f"{what} add", partial(layer_norm.add_layer_norm, x, x.to(FULL), p, p, 1e-5)
        yield f"{what} add rms", partial(layer_norm.add_rms_norm, x, x, p, 1e-5)
        for name, mean in (("", s), (" rms", None)):
            full = x.to(FULL)
            call = partial(layer_norm.add_norm_backward, x, full, full, p, mean, s, True, dtype == HALF)
            yield f"{what} add{name} backward", call


def swiglu_calls() -> Calls:
    for dtype, kind in itertools.product(DTYPES, swiglu.KINDS):
        x, both = meta(8, 1024, 2048, dtype=dtype), meta(8, 1024, 4096, dtype=dtype)
        what = f"{NAMES[dtype]} {kind}"
        for name, pair in (("", (x, x)), (" packed", (both, None))):
            yield what + name, partial(swiglu.gated, kind, *pair)
            yield f"{what}{name} backward", partial(swiglu.gated_backward, kind, x, *pair)


def adamw_calls() -> Calls:
    p, g, m, v = ([meta(768, 768, dtype=FULL), meta(768, dtype=FULL)] for _ in range(4))
    for shadow, zeroes in itertools.product((None, HALF, HALF16), (False, True)):
        shadows = [] if shadow is None else [meta(768, 768, dtype=shadow), meta(768, dtype=shadow)]
        yield (
            f"shadow {shadow}{' zeroing' * zeroes}",
            partial(adamw.adamw, p, g, m, v, [0.1, 0.0], 1e-3, 0.9, 0.95, 1e-8, 1.0, 3, shadows, zeroes),
        )
    yield "grad_norm", partial(adamw.grad_norm, g)


def dropout_calls() -> Calls:
    seed = meta(dtype=torch.int64)
    for dtype, wide in (
        (HALF, None),
        (HALF16, None),
        (FULL, None),
        (HALF, HALF),
        (HALF, FULL),
        (HALF16, FULL),
        (FULL, FULL),
    ):
        x, residual = meta(8, 1024, 768, dtype=dtype), None if wide is None else meta(8, 1024, 768, dtype=wide)
        yield (
            f"{NAMES[dtype]}{'' if wide is None else ' to ' + NAMES[wide]}",
            partial(dropout.dropout, x, residual, seed, 0.1),
        )


def log_softmax_calls() -> Calls:
    for dtype, cols in itertools.product(DTYPES, (65, 1024, 16384, 50304)):
        x = meta(8192, cols, dtype=dtype)
        yield f"{NAMES[dtype]} {cols}", partial(log_softmax.log_softmax, x)
        yield f"{NAMES[dtype]} {cols} backward", partial(log_softmax.log_softmax_backward, x, x)


def rope_calls() -> Calls:
    for dtype, (dim, pairs), interleaved, inverse in itertools.product(
        DTYPES, ((64, 32), (128, 64), (80, 16)), (False, True), (False, True)
    ):
        x, table = meta(8, 1024, 12, dim, dtype=dtype).transpose(1, 2), meta(1024, pairs, dtype=FULL)
        what = f"{NAMES[dtype]} {dim}{' interleaved' * interleaved}{' inverse' * inverse}"
        yield what, partial(rope.rope, x, table, table, interleaved, inverse)


def bias_activation_calls() -> Calls:
    for dtype, kind in itertools.product(DTYPES, activation.KINDS):
        x, bias = meta(8, 1024, 3072, dtype=dtype), meta(3072, dtype=FULL)
        yield f"{NAMES[dtype]} {kind}", partial(bias_activation.bias_activation, x, bias, kind)
        yield (
            f"{NAMES[dtype]} {kind} backward",
            partial(bias_activation.bias_activation_backward, x, x, bias, kind, True),
        )


def embedding_calls() -> Calls:
    for dtype, wide in itertools.product(DTYPES, (torch.int32, torch.int64)):
        ids, weight, grad = meta(8, 1024, dtype=wide), meta(50304, 768, dtype=dtype), meta(8, 1024, 768, dtype=dtype)
        what = f"{NAMES[dtype]} {wide}"
        yield what, partial(embedding.embedding, ids, weight)
        yield f"{what} backward", partial(embedding.embedding_backward, grad, ids, 50304, -1)
        yield f"{what} adding backward", partial(embedding.embedding_accumulate, weight, grad, ids, 0)


CALLS: dict[str, Callable[[], Calls]] = {
    "activation": activation_calls,
    "adamw": adamw_calls,
    "attention": attention_calls,
    "attention_options": attention_option_calls,
    "cross_entropy": cross_entropy_calls,
    "bias_activation": bias_activation_calls,
    "dropout": dropout_calls,
    "embedding": embedding_calls,
    "layer_norm": layer_norm_calls,
    "log_softmax": log_softmax_calls,
    "rope": rope_calls,
    "softmax": softmax_calls,
    "swiglu": swiglu_calls,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compiled kernel uses."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int


class CompileOnlyDriver:
    """Stands where Triton's driver of a GPU would: names the target, launches nothing."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_call(call: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Run a launcher and compile the kernels it would launch: their names and Triton's compiled kernels."""
    compiled: list[tuple[str, Any]] = []
    launch_kernel = JITFunction.run

    def compile_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch_kernel(self, *args, **kwargs | {"warmup": True})
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_kernel
    try:
        call()
    finally:
        JITFunction.run = launch_kernel
    return compiled


def report(kernel: Any) -> Report:
    """What the kernel's machine code says it needs. Triton's kernels have no local arrays, so all of a thread's stack is spills."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return Report(registers, stack + local, kernel.metadata.shared, kernel.metadata.num_warps)


def compile_op(arch: int, op: str) -> tuple[list[str], int]:
    """Compile an op's kernels: a line for each, and how many spill or do not fit."""
    driver.set_active(CompileOnlyDriver(arch))
    launch.assumed_architecture = arch
    seen: set[str] = set()
    lines, failures = [], 0
    for what, call in CALLS[op]():
        for name, kernel in compile_call(call):
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            used = report(kernel)
            spills, too_large = used.spilled_bytes > 0, used.shared_bytes > SHARED_LIMIT_BYTES[arch]
            failures += spills or too_large
            lines.append(
                f"sm_{arch:<4} {name:28} {what:36} {used.warps:2} warps {used.registers:4} registers"
                f" {used.spilled_bytes:5} B spilled {used.shared_bytes:7} B shared"
                f"{'   SPILLS' * spills}{'   TOO LARGE' * too_large}"
            )
    return lines, failures


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line a kernel, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastgpt.kernels.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"ops to compile: {', '.join(CALLS)} (default: all)")
    parser.add_argument("--arch", type=int, action="append", choices=SHARED_LIMIT_BYTES, help="default: 80, 90 and 100")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in CALLS]:
        parser.error(f"op is {unknown[0]!r}, expected one of {', '.join(CALLS)}")
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set; the compiler needs a process without it")

    jobs = [(arch, op) for arch in options.arch or ARCHITECTURES for op in options.ops or CALLS]
    failures = total = 0
    # Processes, since an architecture is a matter of the whole process; new ones, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        run = pool.map if options.jobs > 1 else map
        for lines, failed in run(compile_op, *zip(*jobs, strict=True)):
            print("\n".join(lines), flush=True)
            total, failures = total + len(lines), failures + failed
    print(f"{total} kernels compiled, {failures} spill or do not fit")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
