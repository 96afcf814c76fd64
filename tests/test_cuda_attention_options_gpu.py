"""Windows, packed sequences, dropout and both backwards of attention_sm90 on a GPU: `pytest -m gpu`, compute capability 9.0.

No run of it has been made on a GPU yet, only with the emulation in the module's place. The same kernels pass the same checks there
(tests/emu/test_attention_sm90*.py); the last test compares the two directly, and is the first to run on a GPU.
"""

import itertools
from typing import Any

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor

from fastgpt.ops import backend, cuda_attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend.unavailable("cuda") is not None, reason=str(backend.unavailable("cuda"))),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("attention_sm90 needs compute capability 9.0")
    monkeypatch.setenv("FASTGPT_CUDA_SM90", "1")


@pytest.fixture(params=["deterministic", "fast"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", request.param)
    return str(request.param)


def tensors(queries: int, keys: int, dim: int, dtype: torch.dtype, batch: int, heads: int, kv: int) -> list[Tensor]:
    """Query, key, value and the gradient of the result; heads lie between rows."""
    shapes = [(heads, queries), (kv, keys), (kv, keys), (heads, queries)]
    made = [random(batch, time, h, dim, dtype=dtype, seed=seed) for seed, (h, time) in enumerate(shapes)]
    return [x.cuda().transpose(1, 2) for x in made]


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that the allocator hands out next for tensors of these sizes."""
    kept = [torch.full_like(x, float("nan")) for x in like for _ in range(2)]
    del kept


def in_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *more: Any) -> Tensor:
    """The formula in the inputs' own type, which sets the error that is allowed."""
    options = [*more, *(0.0, None, -1, -1, 0.0, None, None)[len(more) :]]
    dropout_p, seed, left, right, _, cu_q, cu_k = options[:7]
    mask = reference.visible(q.shape[2], k.shape[2], causal, left, right, cu_q, cu_k, q.device)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    p = torch.softmax((q @ k.mT * scale).masked_fill(~mask, -torch.inf), -1)
    p = torch.where(mask.any(-1)[:, None], p, 0.0)
    if dropout_p and seed is not None:
        p = p * (reference.dropout_mask(p.shape, seed, dropout_p) / (1 - dropout_p)).to(p.dtype)
    return p @ v


def check(given: list[Tensor], causal: bool, *more: Any) -> list[Tensor]:
    """Result and gradients at most twice as wrong as torch's, in memory that was NaN."""
    q, k, v, grad = given
    scale = q.shape[3] ** -0.5
    poison(q, k, v)
    out, lse = cuda_attention._attention(q, k, v, causal, scale, *more)
    gradients = cuda_attention._attention_backward(grad, q, k, v, out, lse, causal, scale, *more)
    wide = [x.double() for x in (q, k, v)]
    exact, exact_lse = reference.attention(*wide, causal, scale, *more)
    right = reference.attention_backward(grad.double(), *wide, exact, exact_lse, causal, scale, *more)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = in_torch(*leaves, causal, scale, *more)
    torchs = torch.autograd.grad(theirs, leaves, grad)
    for name, mine, other, exactly in zip("oqkv", (out, *gradients), (theirs, *torchs), (exact, *right), strict=True):
        assert_parity(mine, other, exactly, name)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)
    return [out, lse, *gradients]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(17, 40), (97, 113), (1025, 1025), (130, 3000), (2048, 2048)])
def test_windows(way: str, queries: int, keys: int, dim: int) -> None:
    for window, causal in itertools.product(((1, 0), (100, -1), (257, 31), (-1, 64)), (True, False)):
        dtype = torch.float16 if causal else torch.bfloat16
        check(tensors(queries, keys, dim, dtype, 2, 4, 2), causal, 0.0, None, *window)


LENGTHS = [[(17, 40)], [(300, 300), (1, 1), (0, 0), (1025, 1025), (128, 128)], [(97, 113), (700, 5), (0, 64), (5, 900)]]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=range(len(LENGTHS)))
def test_packed_sequences(way: str, lengths: list[tuple[int, int]], dim: int) -> None:
    offsets = torch.tensor([(0, 0), *lengths]).cumsum(0).cuda()
    longest = [max(column) for column in zip(*lengths, strict=True)]
    queries, keys = offsets[-1].tolist()
    for causal, window in ((True, -1), (False, -1), (True, 90)):
        packed = (0.0, offsets[:, 0].contiguous(), offsets[:, 1].contiguous(), *longest)
        check(tensors(queries, keys, dim, torch.bfloat16, 1, 4, 2), causal, 0.0, None, window, -1, *packed)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(97, 113), (1024, 1024), (300, 1025)])
def test_dropout(way: str, queries: int, keys: int, dim: int) -> None:
    seed = torch.tensor(-(1 << 40) - 77, device="cuda")
    check(tensors(queries, keys, dim, torch.bfloat16, 2, 4, 2), True, 0.2, seed)
    check(tensors(queries, keys, dim, torch.float16, 2, 4, 4), False, 0.5, seed)


@pytest.mark.parametrize("keys", [132, 190])
def test_the_mask_is_that_of_the_other_engines(keys: int) -> None:
    q, k, _, _ = tensors(97, keys, 64, torch.bfloat16, 2, 2, 2)
    seed, weights = torch.tensor(5, device="cuda"), []
    for first in range(0, keys, 64):  # values that are a part of the identity give back the weights
        v = torch.eye(keys, device="cuda").bfloat16()[:, first : first + 64]
        v = torch.nn.functional.pad(v, (0, 64 - v.shape[1])).expand(2, 2, keys, 64)
        weights.append(cuda_attention._attention(q, k, v, False, 0.1, 0.4, seed)[0])
    kept = torch.cat(weights, -1)[..., :keys] != 0
    assert torch.equal(kept, reference.dropout_mask(kept.shape, seed, 0.4).bool())


@pytest.mark.parametrize("dim", [64, 128])
def test_a_thousand_deterministic_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", "deterministic")
    q, k, v, grad = tensors(300, 413, dim, torch.bfloat16, 2, 4, 2)
    more = (0.2, torch.tensor(3, device="cuda"), 200, -1)
    first: list[Tensor] | None = None
    for _ in range(1000):
        out, lse = cuda_attention._attention(q, k, v, True, 0.1, *more)
        found = [out, lse, *cuda_attention._attention_backward(grad, q, k, v, out, lse, True, 0.1, *more)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_both_backwards_agree(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """dK and dV to the bit; dQ up to the order of its fp32 sums."""
    q, k, v, grad = tensors(4097, 4097, dim, torch.bfloat16, 1, 4, 2)
    out, lse = cuda_attention._attention(q, k, v, True, 0.1)
    found = []
    for wanted in ("deterministic", "fast"):
        monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", wanted)
        found.append(cuda_attention._attention_backward(grad, q, k, v, out, lse, True, 0.1))
    (dq, dk, dv), (other_dq, other_dk, other_dv) = found
    assert torch.equal(dk, other_dk)
    assert torch.equal(dv, other_dv)
    torch.testing.assert_close(dq.float(), other_dq.float(), rtol=2**-7, atol=1e-3 * dq.abs().max().item())


@pytest.mark.parametrize("dim", [64, 128])
def test_the_gpu_and_the_emulation_agree(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """Order of sums and exp2's last bits differ; a wrong belief about an instruction is far off."""
    from emu import attention_cases
    from emu.build import compiler
    from emu.emulator import Emulator
    from emu.test_attention_sm90 import dropping, scratch, sums

    if compiler() is None:
        pytest.skip("needs g++")
    monkeypatch.setenv("FASTGPT_CUDA_SM90_BACKWARD", "fast")
    case = attention_cases.Case(150, 260, dim, causal=True, heads=4, kv_heads=2, window=(200, -1), dropout=0.25)
    emulator = Emulator("attention_sm90")
    more = (2, *case.window, *case.offsets, 0, scratch(case), *dropping(case))
    emulated = attention_cases.check(emulator, case, more=more, more_backward=(sums(emulator, case),))
    q, grad = (case.tensor(case.heads, case.queries, seed).cuda().transpose(1, 2) for seed in (1, 4))
    k, v = (case.tensor(case.kv_heads, case.keys, seed).cuda().transpose(1, 2) for seed in (2, 3))
    options = (case.causal, case.scale, case.dropout, torch.tensor(-(1 << 40) - 77, device="cuda"), *case.window)
    out, lse = cuda_attention._attention(q, k, v, *options)
    found = [out, lse, *cuda_attention._attention_backward(grad, q, k, v, out, lse, *options)]
    for mine, theirs in zip(found, emulated, strict=True):
        right = theirs if theirs.dim() == 3 else theirs.transpose(1, 2)
        limit = 2**-7 * right.float().abs().max().item()
        torch.testing.assert_close(mine.cpu().float(), right.float(), rtol=2**-7, atol=limit)
