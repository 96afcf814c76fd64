"""What the GPU benchmark measures, most important first: attention, then the ops that memory bounds, at sizes of GPT-2 and Llama.

Bytes are those that any implementation must move: inputs read once, results written once. FLOPs of attention count a causal mask as
half.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.bias_activation import bias_activation

from ..variants import DTYPES, Variant
from .attention_options import attention_with
from .kit import Bind, Case, Function, Kit, Made, both, exact_gradients, forward, library, liger

SDPA = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
CASES = ("forward", "forward and backward")


def attention(batch: int, heads: int, time: int, dim: int, causal: bool, dtype: str, backward: bool) -> Case:
    def make(kit: Kit) -> Made:
        qkv = kit.normal(batch, time, 3 * heads, dim, dtype=dtype)
        q, k, v = leaves = tuple(part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
        grad = kit.normal(batch, time, heads, dim, dtype=dtype).transpose(1, 2)
        bind = both(leaves, grad) if backward else forward(q, k, v)

        def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        def by(backend: SDPBackend) -> Function:
            def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return in_torch(q, k, v)

            return function

        variants = kit.ours(bind(lambda *x: ops.attention(*x, is_causal=causal)), chips=True)
        variants.append(Variant("torch SDPA", bind(in_torch)))
        if kit.device.type != "cpu":
            for name, backend in SDPA.items():
                variants.append(Variant(f"torch SDPA {name}", bind(by(getattr(SDPBackend, backend))), optional=True))

        def last_head(x: Tensor) -> Tensor:
            return x[-1:, -1:]

        def expected() -> tuple[Tensor, ...]:
            wide_q, wide_k, wide_v = (last_head(x).double() for x in (q, k, v))
            out, lse = reference.attention(wide_q, wide_k, wide_v, causal, 1 / math.sqrt(dim))
            if not backward:
                return (out,)
            wide_grad = last_head(grad).double()
            return reference.attention_backward(wide_grad, wide_q, wide_k, wide_v, out, lse, causal, 1 / math.sqrt(dim))

        pick = (lambda found: tuple(map(last_head, found))) if backward else (lambda found: (last_head(found),))
        return Made(variants, expected, pick)

    flops = (14 if backward else 4) * batch * heads * time * time * dim // (2 if causal else 1)
    name = f"{'forward and backward' if backward else 'forward'}{' causal' * causal}"
    return Case("attention", name, dtype, (batch, heads, time, dim), make, flops=flops)


def decode(batch: int, heads: int, kv_heads: int, keys: int, dim: int, dtype: str) -> Case:
    def make(kit: Kit) -> Made:
        q = kit.normal(batch, heads, 1, dim, dtype=dtype)
        k, v = (kit.normal(batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
        variants = kit.ours(lambda: ops.attention(q, k, v, is_causal=True))
        variants.append(
            Variant("torch SDPA", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads))
        )

        def expected() -> tuple[Tensor, ...]:
            return reference.attention(q.double(), k.double(), v.double(), True, 1 / math.sqrt(dim))[:1]

        return Made(variants, expected)

    moved = 2 * batch * kv_heads * keys * dim * DTYPES[dtype].itemsize
    return Case("attention_decode", "one query", dtype, (batch, heads, kv_heads, keys, dim), make, bytes_moved=moved)


def tuple_of(found: Any) -> tuple[Tensor, ...]:
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def pointwise(
    op: str, ours: Function, torchs: Function, shape: tuple[int, int], dtype: str, backward: bool, passes: tuple[int, int],
    params: int = 0, inputs: int = 1, others: Callable[[Bind], list[Variant]] | None = None,
) -> Case:  # fmt: skip
    """An op of rows. `passes`: how often a tensor of that size is read or written, forward, and forward and backward; `params` vectors
    of a row's width follow `inputs` tensors."""

    def make(kit: Kit) -> Made:
        leaves = tuple(kit.normal(*shape, dtype=dtype) for _ in range(inputs))
        leaves += tuple(kit.normal(shape[1], dtype=dtype) for _ in range(params))
        grad = kit.normal(*shape, dtype=dtype)
        bind = both(leaves, grad) if backward else forward(*leaves)
        variants = kit.ours(bind(ours)) + kit.torchs(torchs, bind) + (others(bind) if others else [])

        def expected() -> tuple[Tensor, ...]:
            if backward:
                return exact_gradients(torchs, leaves, grad)
            return tuple_of(torchs(*(x.double() for x in leaves)))

        return Made(variants, expected, tuple_of)

    moved = passes[backward] * math.prod(shape) * DTYPES[dtype].itemsize
    return Case(op, "forward and backward" if backward else "forward", dtype, shape, make, bytes_moved=moved)


def loss(op: str, tokens: int, classes: int, width: int, dtype: str) -> Case:
    """cross_entropy of logits, or with `width` linear_cross_entropy; forward and backward."""

    def in_torch(*args: Tensor) -> Tensor:
        *tensors, target = args
        logits = tensors[0] @ tensors[1].mT if width else tensors[0]
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)

    def make(kit: Kit) -> Made:
        leaves: tuple[Tensor, ...] = (kit.normal(tokens, width or classes, dtype=dtype),)
        if width:
            leaves += (kit.normal(classes, width, dtype=dtype) * 0.05,)
        target = kit.below(classes, tokens)
        bind = both(leaves, None, target)
        ours = ops.linear_cross_entropy if width else ops.cross_entropy
        name = "liger_fused_linear_cross_entropy" if width else "liger_cross_entropy"
        variants = kit.ours(bind(ours)) + kit.torchs(in_torch, bind) + liger(name, bind)
        if not width:
            variants += library("quack", "quack.cross_entropy", "cross_entropy", bind, reduction="mean")
        rows = slice(None, None, max(1, tokens // 64))

        def expected() -> tuple[Tensor, ...]:
            if width:
                return (exact_gradients(in_torch, leaves, None, target)[0][rows],)
            part = exact_gradients(in_torch, (leaves[0][rows],), None, target[rows])[0]
            return (part * (part.shape[0] / tokens),)

        return Made(variants, expected, lambda found: (found[0][rows],))

    size = DTYPES[dtype].itemsize
    moved = 0 if width else 2 * tokens * classes * size  # logits once, gradient once
    return Case(
        op, "forward and backward", dtype, (tokens, classes, width) if width else (tokens, classes), make, bytes_moved=moved,
        flops=6 * tokens * classes * width,
    )  # fmt: skip


def adamw(count: int, tensors: int) -> Case:
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def make(kit: Kit) -> Made:
        start, grads = ([kit.normal(count // tensors, dtype="fp32") for _ in range(tensors)] for _ in range(2))

        def of_torch(name: str, **how: bool) -> Variant:
            params = [x.clone().requires_grad_() for x in start]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer = torch.optim.AdamW(params, **options, **how)  # type: ignore[arg-type]

            def run() -> Tensor:
                optimizer.step()
                return params[0].detach()

            return Variant(name, run, optional=True, first=lambda: run().clone())

        def ours(engine: str) -> Variant:
            params = [x.clone() for x in start]
            moments = [[torch.zeros_like(x) for x in start] for _ in range(2)]
            step = 0

            def run() -> Tensor:
                nonlocal step
                step += 1
                with ops.use_backend(engine):
                    ops.adamw(params, grads, *moments, step=step, **options)
                return params[0]

            return Variant(f"fastgpt {engine}", run, ours=True, optional=True, first=lambda: run().clone())

        def expected() -> tuple[Tensor, ...]:
            g, x = grads[0].double(), start[0].double()  # first step: both corrected moments are g and g^2
            return (x * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * g / (g.abs() + options["eps"]),)

        variants = [ours(engine) for engine in kit.engines]
        variants += [of_torch("torch foreach", foreach=True), of_torch("torch fused", fused=True)]
        return Made(variants, expected)

    return Case("adamw", "step", "fp32", (count,), make, bytes_moved=7 * 4 * count)


def embedding(tokens: int, vocabulary: int, width: int, dtype: str) -> Case:
    def make(kit: Kit) -> Made:
        weight, grad = kit.normal(vocabulary, width, dtype=dtype), kit.normal(tokens, width, dtype=dtype)
        ids = kit.below(vocabulary, tokens)
        bind = both((weight,), grad, ids)
        swap = lambda function: lambda w, i: function(i, w)  # noqa: E731
        variants = kit.ours(bind(swap(ops.embedding))) + kit.torchs(swap(F.embedding), bind)
        return Made(
            variants, lambda: exact_gradients(swap(F.embedding), (weight,), grad, ids), lambda found: tuple(found)
        )

    moved = (2 * tokens + vocabulary) * width * DTYPES[dtype].itemsize
    return Case("embedding", "forward and backward", dtype, (tokens, vocabulary, width), make, bytes_moved=moved)


def rope(batch: int, heads: int, time: int, dim: int, dtype: str) -> Case:
    def make(kit: Kit) -> Made:
        x, grad = (kit.normal(batch, heads, time, dim, dtype=dtype) for _ in range(2))
        cos, sin = (kit.normal(time, dim // 2, dtype="fp32") for _ in range(2))
        bind = both((x,), grad, cos, sin)

        def in_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

        variants = kit.ours(bind(ops.rope)) + kit.torchs(in_torch, bind)
        return Made(variants, lambda: exact_gradients(in_torch, (x,), grad, cos, sin), lambda found: tuple(found))

    moved = 4 * batch * heads * time * dim * DTYPES[dtype].itemsize
    return Case("rope", "forward and backward", dtype, (batch, heads, time, dim), make, bytes_moved=moved)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, 1e-6)


def ours_rms(x: Tensor, w: Tensor) -> Tensor:
    return ops.rms_norm(x, w.shape, w, 1e-6)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, 1e-5)


def ours_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ops.layer_norm(x, w.shape, w, b, 1e-5)


def add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return rms(x + r, w), x + r


def add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x + r, w, b), x + r


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def rows_cases(shape: tuple[int, int], dtype: str) -> Iterator[Case]:
    """The ops on rows, in the order of what they cost in a training step."""

    def named(ours: Function, torchs: Function) -> tuple[Function, Function]:
        return ours, torchs

    def liger_and(name: str, *more: float) -> Callable[[Bind], list[Variant]]:
        return lambda bind: liger(name, bind, *more)

    def norms(bind: Bind) -> list[Variant]:
        return [*liger("liger_rms_norm", bind, 1e-6), *library("quack", "quack.rmsnorm", "rmsnorm", bind)]

    def softmaxes(bind: Bind) -> list[Variant]:
        return [*liger("liger_softmax", bind), *library("quack", "quack.softmax", "softmax", bind)]

    yield pointwise(
        "add_rms_norm", lambda x, r, w: ops.add_rms_norm(x, r, w.shape, w, 1e-6), add_rms, shape, dtype, False, (4, 7), 1, 2,
    )  # fmt: skip
    yield pointwise(
        "add_layer_norm", lambda x, r, w, b: ops.add_layer_norm(x, r, w.shape, w, b), add_layer, shape, dtype, False, (4, 7), 2, 2,
    )  # fmt: skip
    for backward in (False, True):
        yield pointwise("softmax", ops.softmax, softmax, shape, dtype, backward, (2, 5), others=softmaxes)
        yield pointwise(
            "layer_norm",
            ours_layer,
            layer,
            shape,
            dtype,
            backward,
            (2, 5),
            2,
            others=liger_and("liger_layer_norm", 1e-5),
        )
        yield pointwise("rms_norm", ours_rms, rms, shape, dtype, backward, (2, 5), 1, others=norms)
        yield pointwise(
            "swiglu",
            ops.swiglu,
            lambda a, b: F.silu(a) * b,
            shape,
            dtype,
            backward,
            (3, 8),
            inputs=2,
            others=liger_and("liger_swiglu"),
        )
        yield pointwise("geglu", ops.geglu, lambda a, b: F.gelu(a) * b, shape, dtype, backward, (3, 8), inputs=2)
        yield pointwise("gelu", ops.gelu, F.gelu, shape, dtype, backward, (2, 5))
        yield pointwise(
            "bias_activation", lambda x, b: bias_activation(x, b, "gelu"), lambda x, b: F.gelu(x + b), shape, dtype, backward,
            (2, 5), 1,
        )  # fmt: skip
        yield pointwise(
            "log_softmax", ops.log_softmax, lambda x: torch.log_softmax(x, -1), shape, dtype, backward, (2, 5)
        )
        for name in ("relu", "sigmoid", "tanh", "silu"):
            yield pointwise(
                name, *named(getattr(ops, name), getattr(torch, name, getattr(F, name))), shape, dtype, backward, (2, 5)
            )


def plan(small: bool = False) -> list[Case]:
    """Every case but the training step, most important first; `small` for a machine without a GPU."""
    if small:
        cases = [attention(1, 2, 24, 8, True, "fp32", backward) for backward in (False, True)]
        cases += [attention_with(option, 1, 2, 24, 8, "fp32") for option in ("packed", "dropout")]
        cases += [decode(1, 2, 1, 40, 8, "fp32"), loss("cross_entropy", 8, 33, 0, "fp32"), adamw(64, 2)]
        cases += [loss("linear_cross_entropy", 8, 33, 16, "fp32"), *rows_cases((6, 48), "fp32")]
        return [*cases, embedding(16, 20, 8, "fp32"), rope(1, 2, 6, 8, "fp32")]
    rows = {(case.op, case.case): case for case in rows_cases((16384, 4096), "bf16")}
    wanted = [
        *(attention(16, 12, 1024, 64, True, "bf16", backward) for backward in (False, True)),
        loss("cross_entropy", 8192, 50304, 0, "bf16"),
        loss("linear_cross_entropy", 16384, 50304, 768, "bf16"),
        *(rows[op, case] for op in ("softmax", "layer_norm", "rms_norm", "swiglu", "gelu") for case in CASES),
        adamw(124_000_000 // 148 * 148, 148),
        *(attention(4, 16, 4096, 128, causal, "bf16", backward) for causal in (True, False) for backward in (False, True)),
        attention_with("window", 2, 12, 4096, 64, "bf16"), attention_with("packed", 1, 12, 8192, 64, "bf16"),
        attention_with("dropout", 4, 12, 1024, 64, "bf16"),
        decode(1, 12, 12, 1024, 64, "bf16"),
        decode(16, 32, 8, 8192, 128, "bf16"),
        embedding(16384, 50304, 768, "bf16"),
        rope(16, 12, 1024, 64, "bf16"),
    ]  # fmt: skip
    have = {(case.op, case.case) for case in wanted}
    wanted += [case for key, case in rows.items() if key not in have]
    wanted += [case for case in rows_cases((8192, 50304), "bf16") if case.op in ("softmax", "log_softmax")]
    return wanted + [case for case in rows_cases((16384, 1024), "fp32") if case.case == "forward"]
