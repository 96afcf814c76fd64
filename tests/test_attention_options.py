"""Windows, the soft cap, packed sequences and the cache's ops of attention: every engine's way against a loop over queries."""

import math

import pytest
import torch
from parity import check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def spelled_out(q, k, v, is_causal=False, window=(-1, -1), softcap=0.0):
    """The definition, one query of one head at a time."""
    group, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    heads = []
    for h in range(q.shape[1]):
        rows = []
        for i in range(q.shape[2]):
            left = 0 if window[0] < 0 else max(0, i + shift - window[0])
            right = 0 if is_causal else window[1]
            stop = k.shape[2] if right < 0 else max(0, min(k.shape[2], i + shift + right + 1))
            if left >= stop:
                rows.append(q[:, h, i] * 0)
                continue
            s = (k[:, h // group, left:stop] @ q[:, h, i, :, None])[..., 0] / math.sqrt(q.shape[3])  # (B, keys)
            s = softcap * torch.tanh(s / softcap) if softcap else s
            rows.append((s.softmax(-1)[:, None] @ v[:, h // group, left:stop])[:, 0])
        heads.append(torch.stack(rows, 1) if rows else q[:, h] * 0)
    return torch.stack(heads, 1)


def inputs(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32):
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("lengths", [(9, 9), (4, 11), (11, 6)], ids=str)
@pytest.mark.parametrize(
    ("is_causal", "window"),
    [
        (False, (-1, -1)),
        (True, (3, -1)),
        (False, (2, 0)),
        (False, (2, 1)),
        (False, (-1, 2)),
        (False, (50, 4)),
        (True, (1, 7)),
    ],
)
def test_windows_and_softcap(softcap, lengths, is_causal, window):
    options = {"is_causal": is_causal, "window": window, "softcap": softcap}
    q, k, v = leaves = inputs(16, 4, 2, *lengths, 8)
    exact = spelled_out(*(x.double() for x in leaves), **options)
    torch.testing.assert_close(ops.attention(q, k, v, **options).double(), exact, rtol=1e-5, atol=1e-6)
    check_op(
        lambda *x: ops.attention(*x, **options),
        lambda *x: spelled_out(*x, **options),
        lambda *x: spelled_out(*x, **options),
        leaves,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"is_causal": True, "window": (2, 0)}, {"softcap": 2.0}], ids=str
)
def test_packed_sequences(dtype, options):
    cu_q, cu_k = torch.tensor([0, 5, 5, 8, 9], dtype=torch.int32), torch.tensor([0, 4, 6, 13, 13], dtype=torch.int32)
    leaves = inputs(1, 4, 2, 9, 13, 8, dtype)

    def apart(function):
        def run(q, k, v):
            parts = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
            return torch.cat([function(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], **options) for a, b, c, d in parts], 2)

        return run

    check_op(
        lambda *x: ops.attention(*x, cu_seqlens=(cu_q, cu_k), max_seqlens=(5, 7), **options),
        apart(spelled_out),
        apart(spelled_out),
        leaves,
    )


def test_packed_dropout_is_the_mask_of_one_long_sequence():
    q, k, v = (x.double() for x in inputs(1, 2, 1, 6, 6, 8))
    cu, seed = torch.tensor([0, 2, 6]), torch.tensor(3)
    out = ops.attention(q, k, v, dropout_p=0.4, seed=seed, cu_seqlens=(cu, cu))
    keep = reference.dropout_mask((1, 2, 6, 6), seed, 0.4)
    scores = (q @ k.expand_as(q).mT / math.sqrt(8)).masked_fill(
        torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)) == 0, -math.inf
    )
    torch.testing.assert_close(out, (scores.softmax(-1) * keep / 0.6) @ v)


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"window": (3, 0)}, {"softcap": 2.0}], ids=str)
def test_decode(options):
    q, k, v = inputs(3, 4, 2, 2, 12, 8)
    q, (rows, starts, ends) = q[:2], torch.tensor([[2, 0], [0, 3], [7, 12]])
    out = ops.attention_decode(q, k, v, rows=rows, starts=starts, ends=ends, **options)
    for b, (row, start, end) in enumerate(((2, 0, 7), (0, 3, 12))):
        part = (x[row : row + 1, :, start:end].double() for x in (k, v))
        want = spelled_out(q[b : b + 1].double(), *part, **{"is_causal": True, **options})
        torch.testing.assert_close(out[b : b + 1].double(), want, rtol=1e-5, atol=1e-6)
    whole = ops.attention_decode(q, k[:2], v[:2], **options)
    torch.testing.assert_close(whole, ops.attention(q, k[:2], v[:2], **{"is_causal": True, **options}))
    opcheck(torch.ops.fastgpt.attention_decode.default, (q, k, v, rows, starts, ends, True, 0.3, 2, -1, 1.0))


def test_opcheck():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 6, 6, 8))
    cu = torch.tensor([0, 2, 6])
    for more in ((2, -1, 0.0), (-1, 1, 3.0), (-1, -1, 0.0, cu, cu, 4, 4)):
        opcheck(torch.ops.fastgpt.attention.default, (q, k, v, False, 0.3, 0.0, None, *more))


def test_no_sequences_and_no_queries():
    nothing = torch.zeros(1, dtype=torch.int32)
    q = torch.zeros(1, 2, 0, 8, requires_grad=True)
    out = ops.attention(q, q, q, cu_seqlens=(nothing, nothing))
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    assert ops.attention_decode(q.detach(), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)).shape == q.shape


def test_compiles_without_a_break():
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 1, 6, 6, 8))
    cu = torch.tensor([0, 2, 6])

    def function(q, k, v):
        y = ops.attention(q, k, v, window=(2, 0), softcap=2.0)
        return (
            y + ops.attention(q, k, v, cu_seqlens=(cu, cu)) + ops.attention_decode(q.detach(), k.detach(), v.detach())
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, wanted in zip(
        *(torch.autograd.grad(f(q, k, v).sum(), (q, k, v)) for f in (compiled, function)), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_errors_name_the_argument():
    q, k, v = inputs(2, 2, 1, 4, 4, 8)
    cu = torch.tensor([0, 3])
    for options, message in (
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"max_seqlens": (1, 1)}, "max_seqlens goes with cu_seqlens"),
        ({"cu_seqlens": (cu, cu)}, "with cu_seqlens B is 2, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.attention(q, k, v, **options)
    with pytest.raises(ValueError, match=r"cu_seqlens of the queries is \[0, 3\], expected to rise from 0 to 4"):
        ops.attention(q[:1], k[:1], v[:1], cu_seqlens=(cu, cu))
    with pytest.raises(ValueError, match=r"cu_seqlens of the keys is torch.float32"):
        ops.attention(q[:1], k[:1], v[:1], cu_seqlens=(torch.tensor([0, 4]), cu.float()))
    with pytest.raises(ValueError, match=r"ends is torch.float32 of shape \(2,\)"):
        ops.attention_decode(q, k, v, ends=torch.ones(2))
    with pytest.raises(ValueError, match="2 sequences and a cache of 1 rows"):
        ops.attention_decode(q, k[:1], v[:1])
    with pytest.raises(TypeError, match=r"key torch.float64"):
        ops.attention_decode(q, k.double(), v)
