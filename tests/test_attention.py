"""attention: every engine against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference

INF, NAN = math.inf, math.nan


def torch_attention(q, k, v, is_causal=False, scale=None):
    """torch's own, with the mask aligned to the bottom right."""
    mask = None
    if is_causal and q.shape[2] != k.shape[2]:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    square = is_causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=True)


def formula(q, k, v, is_causal=False, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return reference.attention(q, k, v, is_causal, scale)[0]


def heads(batch, count, time, dim, dtype, seed, scale=1.0):
    """(B, H, T, D) over memory that is (B, T, H, D), as a model's projection leaves it."""
    return random(batch, time, count, dim, dtype=dtype, seed=seed, scale=scale).transpose(1, 2)


def inputs(batch, count, kv_count, queries, keys, dim, dtype=torch.float32, scale=1.0, seed=0):
    return [
        heads(batch, count, queries, dim, dtype, seed, scale),
        heads(batch, kv_count, keys, dim, dtype, seed + 1, scale),
        heads(batch, kv_count, keys, dim, dtype, seed + 2),
    ]


def check(tensors, is_causal=False, scale=None, what=""):
    check_op(
        lambda *x: ops.attention(*x, is_causal=is_causal, scale=scale),
        lambda *x: torch_attention(*x, is_causal, scale),
        lambda *x: formula(*x, is_causal, scale),
        tensors,
        what,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(2, 2), (16, 16), (63, 63), (64, 64), (65, 65), (130, 130), (200, 200), (3, 300), (60, 197), (129, 130)],
    ids=str,
)
def test_lengths(isa, dtype, is_causal, queries, keys):
    # The rule compares two largest errors: short rows need many heads for either to be the same in every draw.
    batch, count = (16, 16) if queries * keys < 1000 else (2, 3)
    check(inputs(batch, count, count, queries, keys, 32, dtype), is_causal, what=f"{queries} x {keys}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_one_key_is_its_value(isa, dtype, queries):
    """The weight is 1 and its gradient 0: nothing to compare roundings with, so the bits of the value and of its gradient."""
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 4, queries, 1, 32, dtype))
    out = ops.attention(q, k, v)
    assert torch.equal(out, v.expand_as(out))
    grad = heads(2, 4, queries, 32, dtype, 9)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    torch.testing.assert_close(dv, grad.double().sum(2, keepdim=True).to(dtype))
    for x in (dq, dk):  # the difference of two equal sums of 32 products of size 1
        assert x.abs().max() <= 1e-5 * math.sqrt(queries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3, 5, 15, 16, 17, 31, 33, 48, 64, 80, 96, 100, 128, 192, 255, 256])
def test_head_sizes(isa, dtype, dim):
    check(inputs(2, 4, 4, 70, 75, dim, dtype), is_causal=True, what=f"D {dim}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("count", "kv_count", "queries"), [(4, 2, 90), (6, 1, 65), (8, 8, 20), (4, 2, 200)], ids=str)
def test_grouped_heads(isa, dtype, is_causal, count, kv_count, queries):
    check(inputs(2, count, kv_count, queries, 100 if queries < 100 else queries, 24, dtype), is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long(isa, dtype):
    check(inputs(1, 1, 1, 1000, 1000, 64, dtype), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 7, 64, 100, 1024, 1025, 2500])
@pytest.mark.parametrize(("kv_count", "dim"), [(4, 64), (2, 80), (1, 7), (4, 40)], ids=str)
def test_one_query(isa, dtype, keys, kv_count, dim):
    q, k, v = inputs(8, 4, kv_count, 1, keys, dim, dtype)
    ours, exact = ops.attention(q, k, v, is_causal=True), formula(q.double(), k.double(), v.double(), True)
    assert_parity(ours, torch_attention(q, k, v), exact, f"{keys} keys")
    assert torch.equal(ours, ops.attention(q, k, v))  # one query sees every key


def test_one_query_is_the_last_of_many(isa):
    q, k, v = inputs(1, 4, 2, 150, 150, 64)
    torch.testing.assert_close(ops.attention(q[:, :, -1:], k, v), ops.attention(q, k, v, is_causal=True)[:, :, -1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(5, 3), (100, 33), (200, 70), (130, 2)], ids=str)
def test_queries_that_see_nothing(isa, dtype, queries, keys):
    q, k, v = (x.requires_grad_() for x in inputs(4, 4, 4, queries, keys, 20, dtype))
    out = ops.attention(q, k, v, is_causal=True)
    blind = queries - keys
    assert (out[:, :, :blind] == 0).all()
    grad = heads(4, 4, queries, 20, dtype, 9)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert (dq[:, :, :blind] == 0).all()
    assert dk.isfinite().all()
    assert dv.isfinite().all()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    # The formula's autograd is NaN through an empty row, so the seeing queries stand alone.
    exact = formula(wide[0][:, :, blind:], wide[1], wide[2], True)
    mine = out[:, :, blind:]
    assert_parity(mine, torch_attention(q[:, :, blind:], k, v, True), exact, "seeing queries")
    grads = torch.autograd.grad(exact, wide, grad[:, :, blind:].double())
    theirs = torch.autograd.grad(torch_attention(q[:, :, blind:], k, v, True), (q, k, v), grad[:, :, blind:])
    for name, ours, torchs, right in zip("qkv", (dq, dk, dv), theirs, grads, strict=True):
        assert_parity(ours, torchs, right, f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_qkv_and_other_strides(isa, dtype):
    qkv = random(2, 70, 3 * 4 * 24, dtype=dtype)
    q, k, v = (x.unflatten(-1, (4, 24)).transpose(1, 2) for x in qkv.chunk(3, -1))
    check([q, k, v], is_causal=True, what="fused qkv")
    cache = random(2, 2, 4, 100, 24, dtype=dtype)  # a KV cache with room
    check([q, cache[0, :, :, :80], cache[1, :, :, :80]], is_causal=True, what="cache")
    check([x.transpose(-1, -2) for x in inputs(4, 4, 4, 24, 24, 24, dtype)], what="D not contiguous")
    shared = random(1, 2, 40, 16, dtype=dtype).expand(3, 2, 40, 16)  # stride 0
    q = random(3, 2, 40, 16, dtype=dtype, seed=4)
    assert torch.equal(ops.attention(q, shared, shared), ops.attention(q, shared.clone(), shared.clone()))


def test_result_merges_heads_without_a_copy(isa):
    out = ops.attention(*inputs(2, 4, 2, 30, 30, 16), is_causal=True)
    merged = out.transpose(1, 2).reshape(2, 30, 64)
    assert merged.data_ptr() == out.data_ptr()
    assert merged.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 0.01, 1.0, 3.0, -0.01, -0.5])
@pytest.mark.parametrize("queries", [1, 70])
def test_scales(isa, dtype, scale, queries):
    q, k, v = inputs(4, 8, 8, queries, 70, 32, dtype)
    exact = formula(q.double(), k.double(), v.double(), True, scale)
    theirs = torch_attention(q if scale > 0 else -q, k, v, True, abs(scale))  # a negative scale turns its mask to +inf
    assert_parity(ops.attention(q, k, v, is_causal=True, scale=scale), theirs, exact, f"{scale}")


@pytest.mark.parametrize("queries", [1, 70])
def test_scale_zero_is_the_mean(isa, queries):
    q, k, v = inputs(1, 2, 2, queries, 70, 32)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e3, 1e9, 1e18])
@pytest.mark.parametrize("queries", [1, 80])
def test_large_scores_do_not_overflow(isa, dtype, size, queries):
    q, k, v = inputs(1, 2, 2, queries, 80, 16, dtype)
    q, k = q.abs() * size, k.abs() * size
    out = ops.attention(q, k, v, scale=1.0)
    assert out.isfinite().all()
    # So steep a softmax picks the value of the largest score; the two largest are far apart here.
    best = (q.double() @ k.double().transpose(-1, -2)).argmax(-1)
    picked = v.gather(2, best[..., None].expand(-1, -1, -1, 16))
    torch.testing.assert_close(out, picked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("value", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 90])
def test_special_values_in_scores(isa, dtype, is_causal, value, queries):
    """A key whose scores are inf or NaN: NaN where the formula has it; -inf takes the key out."""
    for place in (0, 50, 89):
        q, k, v = inputs(1, 1, 1, queries, 90, 16, dtype)
        q = q.abs()
        k[0, 0, place] = value
        exact = formula(q.double(), k.double(), v.double(), is_causal).to(dtype)
        ours = ops.attention(q, k, v, is_causal=is_causal)
        atol = torch.finfo(dtype).eps * 4  # of values of size 1, before they cancel
        torch.testing.assert_close(ours, exact, atol=atol, rtol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 90])
def test_special_values(isa, dtype, queries):
    for row in ([INF], [-INF], [NAN], [INF, -INF]):
        q, k, v = inputs(1, 1, 1, queries, 90, 16, dtype)
        v[0, 0, 0, 3 : 3 + len(row)] = torch.tensor(row, dtype=dtype)
        exact = formula(q.double(), k.double(), v.double())
        assert_parity(ops.attention(q, k, v), torch_attention(q, k, v), exact, f"value {row}")
    q, k, v = inputs(1, 1, 1, queries, 90, 16, dtype)
    exact = formula(q.double(), (k * 0 - INF).double(), v.double())
    assert exact.isnan().all()  # every key at -inf, or a mixture: seen, so not the zero of a query that sees nothing
    assert ops.attention(q, k * 0 - INF, v).isnan().all()
    q[0, 0, queries // 2] = NAN
    exact = formula(q.double(), k.double(), v.double(), True)
    assert_parity(ops.attention(q, k, v, is_causal=True), torch_attention(q, k, v, True), exact, "query NaN")


def test_nan_reaches_the_gradients_it_should(isa):
    q, k, v = inputs(1, 2, 2, 100, 100, 16)
    grad = heads(1, 2, 100, 16, torch.float32, 7)
    grad[0, 1, 40, 2] = NAN
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(ops.attention(*leaves, is_causal=True), leaves, grad)
    assert dq[0, 1, 40].isnan().all()
    assert dk[0, 1, :41].isnan().all()
    assert dv[0, 1, :41, 2].isnan().all()
    for x in (dq, dk, dv):
        assert x[0, 0].isfinite().all()  # the other head


@pytest.mark.parametrize(
    "shape", [(0, 2, 2, 5, 5, 8), (2, 2, 2, 0, 5, 8), (2, 2, 2, 5, 0, 8), (2, 2, 2, 1, 0, 8)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_empty(isa, shape, is_causal):
    tensors = [x.requires_grad_() for x in inputs(*shape)]
    out = ops.attention(*tensors, is_causal=is_causal)
    assert out.shape == tensors[0].shape
    assert (out == 0).all()  # no key: nothing is seen
    for x, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (3, 3)]), st.integers(1, 140), st.integers(0, 140),
    st.integers(1, 70), st.booleans(), st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(batch, count, queries, more_keys, dim, is_causal, dtype, seed):
    """Against the formula in the same precision: every shape lands near it, and no row of the result is left unwritten."""
    tensors = [x.requires_grad_() for x in inputs(batch, *count, queries, queries + more_keys, dim, dtype, seed=seed)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out, exact = ops.attention(*tensors, is_causal=is_causal), formula(*wide, is_causal)
    grad = random(*out.shape, seed=seed + 9, dtype=dtype)
    grads = torch.autograd.grad(out, tensors, grad)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    for ours, right in zip((out, *grads), (exact, *exact_grads), strict=True):
        limit = (2e-5 if dtype == torch.float32 else 4e-2) * (1 + right.abs().max().item())
        assert (ours.double() - right).abs().max().item() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 700, 700, 64), (3, 3, 1, 300, 350, 40), (2, 5, 5, 128, 128, 32), (1, 4, 2, 1, 5000, 64)],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(isa, dtype, shape):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4, 7, 2):
            torch.set_num_threads(threads)
            tensors = [x.requires_grad_() for x in inputs(*shape, dtype)]
            out = ops.attention(*tensors, is_causal=True)
            results.append((out, *torch.autograd.grad(out, tensors, random(*out.shape, dtype=dtype, seed=3))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_query_does_not_depend_on_its_neighbours(isa):
    """The same bits whether the other queries are there or not: cached and uncached logits agree."""
    q, k, v = inputs(1, 2, 2, 200, 200, 64)
    whole = ops.attention(q, k, v, is_causal=True)
    assert torch.equal(ops.attention(q[:, :, 64:], k, v, is_causal=True), whole[:, :, 64:])
    assert torch.equal(ops.attention(q[:, :, :100], k[:, :, :100], v[:, :, :100], is_causal=True), whole[:, :, :100])


def test_lse(isa):
    q, k, v = inputs(2, 4, 2, 70, 90, 32)
    for is_causal in (False, True):
        for queries in (1, 70):
            part = q[:, :, -queries:]
            _, lse = torch.ops.fastgpt.attention(part, k, v, is_causal, 0.3)
            _, exact = reference.attention(part.double(), k.double(), v.double(), is_causal, 0.3)
            torch.testing.assert_close(lse.double(), exact, atol=2e-6, rtol=1e-6)


def test_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 4, 2, 5, 7, 6))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x), (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, is_causal=True, scale=0.7), (q, k, v))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    q, k, v = inputs(2, 4, 2, 5, 9, 8, dtype)
    opcheck(torch.ops.fastgpt.attention.default, (q.clone().requires_grad_(), k.clone().requires_grad_(), v, True, 0.5))
    out, lse = torch.ops.fastgpt.attention(q, k, v, False, 0.5)
    opcheck(torch.ops.fastgpt.attention_backward.default, (torch.ones_like(out), q, k, v, out, lse, False, 0.5))


def test_compile():
    q, k, v = (x.requires_grad_() for x in inputs(1, 4, 2, 9, 12, 8))
    function = lambda *x: ops.attention(*x, is_causal=True).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))
    ours = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad(function(q, k, v).sum(), (q, k, v)))


def test_autocast():
    q, k, v = inputs(1, 2, 2, 9, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q, k, v, is_causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True))


def test_bad_input():
    q, k, v = inputs(1, 4, 2, 5, 5, 8)
    with pytest.raises(ValueError, match="expected \\(B, H, T, D\\)"):
        ops.attention(q[0], k, v)
    with pytest.raises(TypeError, match="int64"):
        ops.attention(q.long(), k, v)
    with pytest.raises(TypeError, match="differ in dtype"):
        ops.attention(q.bfloat16(), k, v)
    with pytest.raises(ValueError, match="differ in shape"):
        ops.attention(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="not a multiple"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="differ in B or D"):
        ops.attention(q[..., :4], k, v)
