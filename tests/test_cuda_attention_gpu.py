"""Attention of the engine `cuda` on a GPU: `pytest -m gpu` on such a machine is all that its verification takes.

No run of it has been made yet. What passes without a GPU is in tests/emu. Before this file: the wrappers of csrc/cuda/ptx.cuh against
the emulation, and compute-sanitizer around one case of each test.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgpt.ops import backend, cuda_attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend.unavailable("cuda") is not None, reason=str(backend.unavailable("cuda"))),
]


@dataclass(frozen=True)
class Case:
    """Sizes of a call, (B, H, T, D)."""

    queries: int
    keys: int
    dim: int = 64
    causal: bool = True
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dtype: torch.dtype = torch.bfloat16

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the gradient of the result; heads lie between rows."""
        shapes = [
            (self.heads, self.queries),
            (self.kv_heads, self.keys),
            (self.kv_heads, self.keys),
            (self.heads, self.queries),
        ]
        made = [
            random(self.batch, time, heads, self.dim, dtype=self.dtype, seed=seed).to(device).transpose(1, 2)
            for seed, (heads, time) in enumerate(shapes)
        ]
        return made[0], made[1], made[2], made[3]


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that the allocator hands out next for tensors of these sizes."""
    kept = [torch.full_like(x, float("nan")) for x in like for _ in range(2)]
    del kept


def check(device: str, case: Case, backward: bool = True) -> list[Tensor]:
    """Hold result, log-sum-exp and gradients to the rule of parity.py; returns them."""
    q, k, v, grad = case.tensors(device)
    scale = case.dim**-0.5
    poison(q, k, v)
    out, lse = cuda_attention._attention(q, k, v, case.causal, scale)
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))
    exact, exact_lse = reference.attention(wide_q, wide_k, wide_v, case.causal, scale)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = reference.causal_mask(case.queries, case.keys, q.device) if case.causal else None
    theirs = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], attn_mask=mask, enable_gqa=True)
    if mask is not None:
        theirs = torch.where(mask.any(-1)[:, None], theirs, 0.0)
    assert_parity(out, theirs, exact, "out")
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)
    if not backward:
        return [out, lse]
    poison(q, k, v)
    gradients = cuda_attention._attention_backward(grad, q, k, v, out, lse, case.causal, scale)
    right = reference.attention_backward(grad.double(), wide_q, wide_k, wide_v, exact, exact_lse, case.causal, scale)
    for name, mine, torchs, exactly in zip(
        "qkv", gradients, torch.autograd.grad(theirs, leaves, grad), right, strict=True
    ):
        assert_parity(mine, torchs, exactly, f"gradient of {name}")
    return [out, lse, *gradients]


@pytest.fixture(params=[80, 90])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each set of kernels in turn; the second where the device has its instructions."""
    if request.param == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("attention_sm90 needs compute capability 9.0")
    monkeypatch.setenv("FASTGPT_CUDA_SM90", str(int(request.param == 90)))
    return int(request.param)


SIZES = [(17, 17), (97, 113), (113, 97), (128, 128), (1024, 1024), (1025, 1025), (64, 2000), (4096, 4096)]


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_parity(chip: int, queries: int, keys: int, dim: int, causal: bool) -> None:
    if chip == 90 and dim not in cuda_attention.SM90_DIMS:
        pytest.skip("not of this set")
    for dtype, (heads, kv_heads) in itertools.product((torch.bfloat16, torch.float16), ((4, 4), (4, 1))):
        check("cuda", Case(queries, keys, dim, causal, 1 if max(queries, keys) > 2000 else 2, heads, kv_heads, dtype))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_longest_rows(chip: int, dim: int) -> None:
    check("cuda", Case(130, 16_384, dim, batch=1, heads=2, kv_heads=1))
    check("cuda", Case(16_384, 130, dim, batch=1, heads=1, kv_heads=1))


@pytest.mark.parametrize("dim", [64, 128])
def test_a_thousand_runs_give_the_same_bits(chip: int, dim: int) -> None:
    q, k, v, grad = Case(300, 413, dim).tensors("cuda")
    first = cuda_attention._attention(q, k, v, True, 0.1)
    first_grads = cuda_attention._attention_backward(grad, q, k, v, *first, True, 0.1)
    for _ in range(1000):
        again = cuda_attention._attention(q, k, v, True, 0.1)
        grads = cuda_attention._attention_backward(grad, q, k, v, *again, True, 0.1)
        assert all(torch.equal(a, b) for a, b in zip((*first, *first_grads), (*again, *grads), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_decode(dtype: torch.dtype, dim: int) -> None:
    for keys, (heads, kv_heads), queries in itertools.product((1, 97, 1025, 16_384), ((4, 4), (8, 1)), (1, 2)):
        check("cuda", Case(queries, keys, dim, True, 2, heads, kv_heads, dtype), backward=False)


def test_it_runs_on_the_current_stream_and_in_a_graph(chip: int) -> None:
    q, k, v, _ = Case(200, 200).tensors("cuda")
    right = cuda_attention._attention(q, k, v, True, 0.1)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream would be done before the copy below
        moved = q * 1.0
        out = cuda_attention._attention(moved, k, v, True, 0.1)[0]
    stream.synchronize()
    assert torch.equal(out, right)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(q)
    with torch.cuda.graph(graph):
        captured = cuda_attention._attention(static, k, v, True, 0.1)[0]
    static.copy_(q)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, right)
