"""Dropout inside attention: the CPU engine against the formula, with the mask of ops.dropout."""

import math

import pytest
import torch
from parity import DTYPES, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference

SEED = torch.tensor(987654321987654321)


def inputs(batch, count, kv_count, queries, keys, dim, dtype=torch.float32):
    shapes = (queries, count), (keys, kv_count), (keys, kv_count)
    return [
        random(batch, time, n, dim, dtype=dtype, seed=seed).transpose(1, 2) for seed, (time, n) in enumerate(shapes)
    ]


def torch_attention(q, k, v, is_causal, p):
    """torch's own ops in the inputs' dtype, with our mask: its fused attention takes none. P comes from lse, as it does there."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(~reference.causal_mask(q.shape[2], k.shape[2], q.device), -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse))
    return (weights * (reference.dropout_mask(weights.shape, SEED, p) / (1 - p)).to(weights.dtype)) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(2, 4), (64, 64), (130, 132), (1, 3), (33, 65), (70, 131), (130, 130), (1, 200)]
)
def test_parity(isa, dtype, is_causal, queries, keys):
    scale = 1 / math.sqrt(24)
    for p in (0.1, 0.5):
        check_op(
            lambda *x: ops.attention(*x, is_causal=is_causal, dropout_p=p, seed=SEED),  # noqa: B023
            lambda *x: torch_attention(*x, is_causal, p),  # noqa: B023
            lambda *x: reference.attention(*x, is_causal, scale, p, SEED)[0],  # noqa: B023
            inputs(2, 4, 2, queries, keys, 24, dtype),
            f"p {p}",
        )


@pytest.mark.parametrize("keys", [64, 67, 129, 130])
def test_the_mask_is_that_of_ops_dropout(isa, keys):
    """Equal weights and values of unit vectors show every factor: out[b, h, i, j] = factor / keys."""
    q, k = torch.zeros(2, 3, 70, keys), torch.zeros(2, 3, keys, keys)
    v = torch.eye(keys).expand(2, 3, keys, keys)
    out = ops.attention(q, k, v, dropout_p=0.3, seed=5) * keys
    torch.testing.assert_close(out.contiguous(), ops.dropout(torch.ones(2, 3, 70, keys), 0.3, seed=5))


def test_seeds_and_threads(isa):
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 140, 141, 16))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = ops.attention(q, k, v, is_causal=True, dropout_p=0.2, seed=3)
            results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.manual_seed(2)
    first, second = (ops.attention(q, k, v, dropout_p=0.2) for _ in range(2))
    torch.manual_seed(2)
    assert torch.equal(first, ops.attention(q, k, v, dropout_p=0.2))
    assert not torch.equal(first, second)
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.0, seed=3), ops.attention(q, k, v))
    assert (ops.attention(q, k, v, dropout_p=1.0) == 0).all()


def test_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 4, 2, 5, 7, 6))
    function = lambda *x: ops.attention(*x, is_causal=True, dropout_p=0.4, seed=1)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v = inputs(2, 4, 2, 5, 9, 8, dtype)
    opcheck(torch.ops.fastgpt.attention.default, (q.clone().requires_grad_(), k, v, True, 0.5, 0.2, SEED))
    out, lse = torch.ops.fastgpt.attention(q, k, v, False, 0.5, 0.2, SEED)
    opcheck(torch.ops.fastgpt.attention_backward.default, (out, q, k, v, out, lse, False, 0.5, 0.2, SEED))


def test_compile():
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, 9, 12, 8))
    function = lambda *x: ops.attention(*x, is_causal=True, dropout_p=0.3, seed=8).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    ours = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad(function(q, k, v).sum(), (q, k, v)))


def test_bad_input():
    q, k, v = inputs(1, 4, 2, 5, 5, 8)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="dropout_p is"):
            ops.attention(q, k, v, dropout_p=p)
    with pytest.raises(ValueError, match="attention: seed is -1"):
        ops.attention(q, k, v, dropout_p=0.1, seed=-1)
