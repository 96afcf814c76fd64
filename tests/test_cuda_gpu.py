"""The memory-bound kernels of the engine `cuda` on a GPU: what must pass before VERIFIED in fastgpt/ops/cuda.py names their ops.

    python -m pytest -m gpu tests

Each wrapper is first compared with the emulation, then held to the formula at odd and real sizes with outputs that start as NaN, then
repeated bitwise; then sizes beyond 2^31, other devices, dtypes and addresses, streams, graphs and errors.
"""

import subprocess
import sys

import pytest
import torch
from cuda_cases import DTYPES, OPS, REAL, SIZES, arguments, call, check, moved, tensors_of
from emu.build import compiler
from emu.engine import Wrappers, implementation, on_emulator, poisoned
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import backend, cuda

REASON = cuda.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"needs the engine cuda: {REASON}")]
LARGE = 2**31 + 4096  # elements


def on_gpu(op: str, args: tuple[object, ...]) -> list[Tensor]:
    with poisoned():
        return call(op, "cuda", moved(args, lambda x: x.cuda()))


def free(gigabytes: float) -> None:
    """Skip unless the GPU has so much memory left."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


@pytest.mark.skipif(compiler() is None, reason="the emulation needs g++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_1_each_wrapper_gives_what_the_emulation_gives(op: str, dtype: torch.dtype) -> None:
    emulator = Wrappers()
    for rows, cols in SIZES.values():
        args = arguments(op, rows, cols, dtype)
        with on_emulator(emulator, guarded=False):
            emulated = call(op, "cuda", moved(args, Tensor.clone))
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 4e-3
        for ours, expected in zip(on_gpu(op, args), emulated, strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_2_each_op_is_the_formula(op: str, dtype: torch.dtype) -> None:
    for rows, cols in (*SIZES.values(), REAL["gpt2"], REAL["wide"]):
        args = arguments(op, rows, cols, dtype)
        check(op, on_gpu(op, args), args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["softmax", "softmax_backward", "log_softmax", "cross_entropy", "cross_entropy_backward",
                                "cross_entropy_inplace", "layer_norm"])  # fmt: skip
def test_2_wide_rows(op: str, dtype: torch.dtype) -> None:
    for size in ("vocabulary", "largest"):
        args = arguments(op, *REAL[size], dtype)
        check(op, on_gpu(op, args), args)


@pytest.mark.parametrize("op", OPS)
def test_3_a_thousand_repeats_are_the_same_bits(op: str) -> None:
    args = moved(arguments(op, 601, 1032, torch.bfloat16), lambda x: x.cuda())

    def once() -> list[Tensor]:
        mine = moved(args, Tensor.clone)
        result = implementation(op.partition(":")[0])(*mine)
        return [*tensors_of(result), *tensors_of(mine)]

    first = once()
    for _ in range(1000):
        for one, other in zip(first, once(), strict=True):
            assert torch.equal(one, other)


def test_4_more_than_2_31_elements() -> None:
    free(30)
    cols = 4096
    x = torch.zeros(LARGE // cols, cols, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(cols, device="cuda").bfloat16()
    last = x[-1:].clone()
    weight = torch.randn(cols, device="cuda").bfloat16()
    for op, args, alone in (
        ("gelu", (x, "none"), (last, "none")),
        ("softmax", (x, None, 1.0, False), (last, None, 1.0, False)),
        ("layer_norm", (x, weight, weight, 1e-5), (last, weight, weight, 1e-5)),
        ("bias_activation", (x, weight, "silu"), (last, weight, "silu")),
        ("swiglu", (x, x), (last, last)),
    ):
        results = [implementation(op)(*a) for a in (args, alone)]
        whole, part = (r[0] if isinstance(r, tuple) else r for r in results)
        assert torch.equal(whole[-1:], part), op
        del results, whole, part
    target = torch.zeros(len(x), dtype=torch.int64, device="cuda")
    expected, mine = last.clone(), x
    implementation("cross_entropy_inplace")(expected, target[-1:], -100, "sum", 0.0, 0.0)
    implementation("cross_entropy_inplace")(mine, target, -100, "sum", 0.0, 0.0)
    assert torch.equal(mine[-1:], expected)


def test_4_an_embedding_and_an_update_beyond_2_31_elements() -> None:
    free(60)
    weight = torch.zeros(LARGE // 1024, 1024, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 3.0
    ids = torch.tensor([len(weight) - 1, 0], device="cuda")
    assert implementation("embedding")(ids, weight, -1, False)[:, -1].tolist() == [3.0, 0.0]
    grad = torch.ones(2, 1024, dtype=torch.bfloat16, device="cuda")
    implementation("embedding_accumulate_backward")(weight, grad, ids, -1)
    assert weight[-1, -1] == 4.0
    del weight
    lists = [[torch.full((LARGE,), value, device="cuda")] for value in (1.0, 1.0, 0.0, 0.0)]
    implementation("adamw")(*lists, [0.0], 0.5, 0.9, 0.99, 0.0, 1.0, 1, [], True)
    assert torch.equal(lists[0][0][-4096:], torch.full((4096,), 0.5, device="cuda"))
    assert not lists[1][0][-1]


def test_5_other_inputs_raise_or_are_right() -> None:
    x = torch.randn(4, 96, device="cuda")
    for args in ((x.double(), None, None, 1e-5), (x.cpu(), None, None, 1e-5), (x, torch.ones(96), None, 1e-5)):
        with pytest.raises(backend.NotCovered):
            implementation("layer_norm")(*args)
    with pytest.raises(backend.NotCovered):
        implementation("softmax")(torch.zeros(1, 262_145, device="cuda"), None, 1.0, False)
    flat = torch.randn(4 * 96 + 1, device="cuda")
    shifted, strided = flat[1:].view(4, 96), torch.randn(96, 4, device="cuda").t()
    for y in (shifted, strided):  # not aligned to 16 bytes, not contiguous
        expected = implementation("layer_norm")(y.clone(memory_format=torch.contiguous_format), None, None, 1e-5)[0]
        torch.testing.assert_close(implementation("layer_norm")(y, None, None, 1e-5)[0], expected)
    with pytest.raises(ValueError, match="2\\^31 - 1 blocks"):
        cuda._launch("scale_rows", x.device, 0, x, x, False, 2**31, 4)


def test_6_streams_are_respected() -> None:
    side, size = torch.cuda.Stream(), 1 << 24
    source = torch.zeros(size, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read before this ends
        source.fill_(1.0)
        y = implementation("relu")(source)
    side.synchronize()
    assert bool((y == 1.0).all())


def test_6_a_graph_holds_a_step() -> None:
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16)
    weight, target = torch.ones(768, device="cuda"), torch.randint(768, (64,), device="cuda")
    lists = [[torch.ones(5000, device="cuda")] for _ in range(4)]

    def step() -> Tensor:
        y, mean, rstd = implementation("layer_norm")(x, weight, None, 1e-5)
        implementation("layer_norm_backward")(y, x, weight, mean, rstd, True)
        implementation("adamw")(*lists, [0.0], 1e-3, 0.9, 0.99, 1e-8, 1.0, 1, [], False)
        return implementation("cross_entropy")(y, target, -100, "mean", 0.0)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(64, 768, device="cuda"))
    graph.replay()
    y = implementation("layer_norm")(x, weight, None, 1e-5)[0]
    expected = implementation("cross_entropy")(y, target, -100, "mean", 0.0)[0]
    assert torch.equal(captured, expected)


def test_7_an_error_of_a_kernel_is_raised() -> None:
    program = (
        "import torch; from fastgpt.ops import cuda; d = torch.device('cuda', 0); torch.zeros(1, device=d)\n"
        "cuda._launch('activation', d, 0, 0, 256, 256, 4096)\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "illegal" in done.stderr or "misaligned" in done.stderr


def test_8_a_layer_learns_with_the_engine_forced() -> None:
    x = torch.randn(64, 96, device="cuda")
    target = torch.randint(50, (64,), device="cuda")
    weight = torch.randn(50, 96, device="cuda").mul_(0.1).requires_grad_()
    moments = [[torch.zeros_like(weight)], [torch.zeros_like(weight)]]
    losses = []
    with ops.use_backend("cuda"):
        for step in range(1, 31):
            loss = ops.cross_entropy(ops.rms_norm(x, (96,)) @ weight.t(), target, inplace_backward=True)
            (grad,) = torch.autograd.grad(loss, weight)
            ops.adamw([weight.detach()], [grad], *moments, step=step, lr=0.05)
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
