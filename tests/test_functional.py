"""Attention with torch's and flash-attn's signatures: against torch's own and against flash-attn's definitions in float64."""

import logging

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, random

from fastgpt import functional, ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 4, 9, 16)] * 3, {}),
        ([(2, 4, 9, 16)] * 3, {"is_causal": True, "scale": 0.3}),
        ([(2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16)], {"is_causal": True}),  # top left, unlike the op
        ([(2, 4, 9, 16), (2, 4, 5, 16), (2, 4, 5, 16)], {"is_causal": True}),
        ([(2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)], {"enable_gqa": True, "is_causal": True}),
        ([(4, 9, 16)] * 3, {"is_causal": True}),
        ([(2, 3, 4, 9, 16)] * 3, {"is_causal": True}),
        ([(2, 4, 9, 16), (2, 4, 7, 16), (2, 4, 7, 8)], {}),  # a value of another width
    ],
)
def test_sdpa_is_torchs(shapes: list, options: dict, dtype: torch.dtype) -> None:
    inputs = [random(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def run(function, dtype: torch.dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves, **options)
        return y, *torch.autograd.grad(y, leaves, random(*y.shape, seed=7, dtype=inputs[0].dtype).to(dtype))

    torchs, exact = (run(F.scaled_dot_product_attention, kind) for kind in (dtype, torch.float64))
    for i, (mine, theirs, want) in enumerate(
        zip(run(functional.scaled_dot_product_attention, dtype), torchs, exact, strict=True)
    ):
        assert_parity(mine, theirs, want, f"result {i}")


def test_what_is_covered_does_not_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_torch_attention", None)
    q = random(2, 4, 9, 16)
    functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)
    functional.flash_attn_func(q, q, q, causal=True)


def test_a_mask_goes_to_torch_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    functional._log_once.cache_clear()
    q, mask = random(1, 2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    with caplog.at_level(logging.WARNING, logger="fastgpt"):
        got = [functional.scaled_dot_product_attention(q, q, q, mask) for _ in range(2)]
    assert torch.equal(got[0], F.scaled_dot_product_attention(q, q, q, mask))
    assert [record.getMessage() for record in caplog.records] == [
        "attention with a mask is computed by torch: the fastgpt op does not support it"
    ]


@pytest.mark.parametrize("queries", [7, 5])
def test_dropout_is_the_op_s_and_follows_torch_s_seed(queries: int) -> None:
    """Under a causal mask torch's alignment is kept, whose first query sees the first key only."""
    q, k = random(2, 4, queries, 8), random(2, 2, 7, 8, seed=1)
    options = {"is_causal": True, "enable_gqa": True}

    def run(seed: int, p: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return functional.scaled_dot_product_attention(q, k, k, dropout_p=p, **options)

    assert torch.equal(run(1, 0.5), run(1, 0.5))
    assert not torch.equal(run(1, 0.5), run(2, 0.5))
    first = run(1, 0.5)[:, :, 0]
    seen = k[:, :, 0].repeat_interleave(2, 1)
    kept = first.abs().sum(-1) > 0
    torch.testing.assert_close(first[kept], 2 * seen[kept])
    exact = F.scaled_dot_product_attention(q, k, k, **options)
    many = torch.stack([run(seed, 0.2) for seed in range(1000)])
    assert ((many.mean(0) - exact).abs() < 6 * many.std(0) / 1000**0.5 + 1e-5).all()
    for p in (-0.1, 1.1):
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(q, k, k, dropout_p=p, **options)
        with pytest.raises(RuntimeError) as ours:
            functional.scaled_dot_product_attention(q, k, k, dropout_p=p, **options)
        assert str(ours.value) == str(theirs.value)


def test_wrong_shapes_raise_torchs_errors() -> None:
    q = random(1, 2, 5, 8)
    for arguments in ((q, q[..., :4], q), (q, q[:, :1].expand(1, 3, 5, 8), q), (q, q.double(), q)):
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(*arguments)
        with pytest.raises(RuntimeError) as ours:
            functional.scaled_dot_product_attention(*arguments)
        assert str(ours.value) == str(theirs.value)


def flash(q, k, v, *, scale=None, causal=False, window=(-1, -1), slopes=None, softcap=0.0):
    """flash-attn's definition (its tests' attention_ref) in float64, one query, one head at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(Tq):
                at = i + Tk - Tq
                seen = [
                    j
                    for j in range(Tk)
                    if not (causal and j > at)
                    and not (window[0] >= 0 and j < at - window[0])
                    and not (window[1] >= 0 and j > at + window[1])
                ]
                if not seen:
                    continue
                scores = k[b, seen, h // group].double() @ q[b, i, h].double() * (scale or q.shape[-1] ** -0.5)
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    slope = slopes[b, h] if slopes.dim() == 2 else slopes[h]
                    scores = scores - slope * (torch.tensor(seen) - at).abs()
                out[b, i, h] = scores.softmax(0) @ v[b, seen, h // group].double()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "scale": 0.2},
        {"causal": True, "window": (3, 0)},
        {"window": (2, 1)},
        {"window": (-1, 2)},
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.7]), "causal": True},
        {"slopes": torch.rand(2, 4)},
        {"causal": True, "softcap": 1.5},
        {"window": (2, 1), "softcap": 1.5},
    ],
)
@pytest.mark.parametrize("lengths", [(7, 7), (3, 8), (8, 5)])
def test_flash_attn_func(lengths: tuple[int, int], options: dict) -> None:
    q, k, v = random(2, lengths[0], 4, 8), random(2, lengths[1], 2, 8, seed=1), random(2, lengths[1], 2, 8, seed=2)
    got = functional.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=options.get("scale"),
        causal=options.get("causal", False),
        window_size=options.get("window", (-1, -1)),
        softcap=options.get("softcap", 0.0),
        alibi_slopes=options.get("slopes"),
    )
    torch.testing.assert_close(got.double(), flash(q, k, v, **options), rtol=1e-5, atol=1e-6)


def test_qkvpacked_and_varlen() -> None:
    qkv = random(2, 7, 3, 4, 8)
    packed = functional.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(packed.double(), flash(*qkv.unbind(2), causal=True), rtol=1e-5, atol=1e-6)
    flat = qkv.flatten(0, 1)[:12].requires_grad_()
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    got = functional.flash_attn_varlen_func(*flat.unbind(1), cu, cu, 7, 7, causal=True)
    for start, end in ((0, 5), (5, 12)):
        want = flash(*(x[None, start:end].detach() for x in flat.unbind(1)), causal=True)[0]
        torch.testing.assert_close(got[start:end].detach().double(), want, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert flat.grad is not None
    assert flat.grad[:, 2].abs().min() > 0


@pytest.mark.parametrize("causal", [True, False])
def test_with_kvcache(causal: bool) -> None:
    q, k, v = random(2, 3, 4, 8), random(2, 3, 2, 8, seed=1), random(2, 3, 2, 8, seed=2)
    k_cache, v_cache = random(4, 16, 2, 8, seed=3), random(4, 16, 2, 8, seed=4)
    keys, values = k_cache.clone(), v_cache.clone()
    cos, sin = ops.rope_tables(8, 16)
    rows, lengths, starts = torch.tensor([2, 0]), torch.tensor([5, 9]), torch.tensor([0, 2])
    got = functional.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        sin,
        cache_seqlens=lengths,
        cache_batch_idx=rows,
        cache_leftpad=starts,
        causal=causal,
    )
    for b, (row, length, start) in enumerate(zip((2, 0), (5, 9), (0, 2), strict=True)):
        positions = range(length, length + 3)
        turned_k = torch.cat([rotated(k[b : b + 1, i : i + 1], p) for i, p in enumerate(positions)], 1)
        at = positions if causal else [length] * 3
        turned_q = torch.cat([rotated(q[b : b + 1, i : i + 1], p) for i, p in enumerate(at)], 1)
        keys[row, length : length + 3], values[row, length : length + 3] = turned_k[0], v[b]
        want = flash(
            turned_q, keys[None, row, start : length + 3], values[None, row, start : length + 3], causal=causal
        )
        torch.testing.assert_close(got[b : b + 1].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k_cache, keys)
    assert torch.equal(v_cache, values)


@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_a_step_over_the_cache_looks_at_no_value(causal: bool, new: int) -> None:
    """The way taken on a GPU, against the one sequence at a time of the CPU."""
    q, cache = random(2, 3, 4, 8), (random(4, 16, 2, 8, seed=3), random(4, 16, 2, 8, seed=4))
    k, v = (random(2, new, 2, 8, seed=seed) if new else None for seed in (1, 2))
    rows, lengths, starts = torch.tensor([2, 0]), torch.tensor([5, 9]), torch.tensor([0, 2])
    mine, theirs = [x.clone() for x in cache], [x.clone() for x in cache]
    rest = (causal, (4, -1), 1.5)
    got = functional._step_over_cache(q, *mine, k, v, lengths, rows, starts, None, *rest)
    want = functional.flash_attn_with_kvcache(
        q, *theirs, k, v, None, None, lengths, rows, starts, None, None, causal, (4, -1), 1.5
    )
    torch.testing.assert_close(got, want)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(mine[0], cache[0]) == (new == 0)


def test_packed_sequences_in_one_call_are_those_of_one_call_each() -> None:
    flat, cu = random(12, 3, 4, 8), torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    for window, softcap in (((-1, -1), 0.0), ((2, 0), 1.5)):
        want = functional.flash_attn_varlen_func(
            *flat.unbind(1), cu, cu, 7, 7, 0.0, None, True, window, softcap, None, False, False
        )
        got = functional._packed(*flat.unbind(1), cu, cu, 7, 7, 0.0, None, True, window, softcap)
        torch.testing.assert_close(got, want)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """x (1, 1, H, 8) with the pairs (2i, 2i + 1) turned as complex numbers."""
    angles = position * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turns = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
    return torch.view_as_real(turns).flatten(-2).float()


def test_errors_name_the_argument() -> None:
    q = random(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"flash_attn_func: k has shape \(3, 2, 8\), expected \(B, T, H, D\)"):
        functional.flash_attn_func(q, q[0], q)
    with pytest.raises(NotImplementedError, match=r"softcap is 30.0 with alibi_slopes"):
        functional.flash_attn_func(q, q, q, softcap=30.0, alibi_slopes=torch.ones(2))
    with pytest.raises(ValueError, match="qkv has shape"):
        functional.flash_attn_qkvpacked_func(q)
    cu = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="expected to rise from 0 to 3"):
        functional.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 2, 2)
    with pytest.raises(ValueError, match="the cache has 3"):
        functional.flash_attn_with_kvcache(q, q.clone(), q.clone(), q, q, cache_seqlens=1)
    with pytest.raises(NotImplementedError, match="block_table"):
        functional.flash_attn_with_kvcache(q, q, q, block_table=cu)
