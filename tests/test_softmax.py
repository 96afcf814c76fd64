"""softmax: every engine against the formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def torch_softmax(x, mask=None, scale=1.0, is_causal=False):
    """The same in torch's own functions."""
    v = x * scale
    if mask is not None:
        v = v + mask.to(v.dtype)
    if is_causal:
        v = v.masked_fill(~torch.ones(x.shape[-2:], dtype=torch.bool).tril(x.shape[-1] - x.shape[-2]), -torch.inf)
    return torch.softmax(v, -1)


def check(x, mask=None, scale=1.0, is_causal=False, what=""):
    check_op(
        lambda v: ops.softmax(v, mask=mask, scale=scale, is_causal=is_causal),
        lambda v: torch_softmax(v, mask, scale, is_causal),
        lambda v: reference.softmax(v, mask, scale, is_causal),
        [x],
        what,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (3,), (2, 1), (5, 16), (7, 17), (3, 5, 100), (2, 3, 4, 65), (2, 2, 2, 3, 33)], ids=str
)
def test_parity(isa, dtype, shape):
    check(random(*shape, dtype=dtype, scale=4.0), what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(isa, dtype):
    check(random(9, 50257, dtype=dtype), what="a vocabulary")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (40, 40), (3, 70)], ids=str)
def test_causal(isa, dtype, queries, keys):
    check(random(2, 3, queries, keys, dtype=dtype), is_causal=True, scale=0.3, what=f"{queries} x {keys}")


def test_causal_rows_that_see_nothing_are_nan(isa):
    y = ops.softmax(random(5, 3), is_causal=True)
    assert y[:2].isnan().all()
    torch.testing.assert_close(y[2:], torch_softmax(random(5, 3)[2:], is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mask_shape", [(7, 33), (33,), (1, 33), (7, 1), (4, 1, 1, 33), (1, 3, 7, 33), (4, 3, 7, 33), (4, 3, 7, 1)], ids=str
)
def test_masks_broadcast(isa, dtype, mask_shape):
    mask = random(*mask_shape, seed=5)
    check(random(4, 3, 7, 33, dtype=dtype), mask=mask, scale=0.7, what=f"{mask_shape}")


def test_bool_mask_takes_positions_out(isa):
    x = random(6, 20)
    keep = random(6, 20, seed=1) > -0.5
    y = ops.softmax(x, mask=keep)
    torch.testing.assert_close(y, torch.softmax(x.masked_fill(~keep, -torch.inf), -1))
    assert (y[~keep] == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_every_dim(isa, dim):
    x = random(4, 5, 6)
    check_op(
        lambda v: ops.softmax(v, dim),
        lambda v: torch.softmax(v, dim),
        lambda v: torch.softmax(v, dim),
        [x],
        f"dim {dim}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(isa, dtype):
    inf, nan = float("inf"), float("nan")
    rows = [
        [0.0, inf, 1.0],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [nan, 0.0, 1.0],
        [inf, inf, 0.0],
        [3e38, -3e38, 0.0],
        [1e4, 1e4, 1e4],
    ]
    x = torch.tensor(rows, dtype=dtype).repeat(1, 11)
    assert_parity(ops.softmax(x), torch.softmax(x, -1), torch.softmax(x.double(), -1), "special values")


@pytest.mark.parametrize("cols", [11, 64])
def test_large_values_count_by_their_differences(isa, cols):
    """Rows whose largest value is far beyond what a difference can be: all alike, and a few units apart."""
    x = torch.full((3, cols), -1e30)
    x[1] = 1e30
    x[2] = 16777216.0 - 2.0 * torch.arange(cols)
    assert_parity(ops.softmax(x), torch.softmax(x, -1), torch.softmax(x.double(), -1), "large")
    scaled = ops.softmax(x[2] / 8.0, scale=8.0)
    torch.testing.assert_close(scaled, torch.softmax(x[2], -1))


def test_empty():
    assert ops.softmax(torch.empty(0, 5)).shape == (0, 5)
    assert ops.softmax(torch.empty(5, 0)).shape == (5, 0)
    assert ops.softmax(torch.tensor(3.0)).item() == 1.0


def test_strided(isa):
    check(random(40, 30).t(), what="transposed")
    check(random(8, 64)[:, ::2], what="every other column")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.floats(-100, 100), st.integers(0, 2**31))
def test_rows_sum_to_one_and_shifts_cancel(cols, rows, shift, seed):
    x = random(rows, cols, seed=seed, scale=5.0)
    y = ops.softmax(x)
    torch.testing.assert_close(y.sum(-1), torch.ones(rows))
    torch.testing.assert_close(ops.softmax((x.double() + shift).float()), y, atol=1e-4, rtol=1e-4)


def test_same_bits_for_any_number_of_threads(isa):
    x = random(64, 1000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(ops.softmax(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradcheck():
    x = random(3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: ops.softmax(v, scale=0.5), (x,))
    assert torch.autograd.gradcheck(lambda v: ops.softmax(v, is_causal=True), (x,))
    assert torch.autograd.gradcheck(lambda v: ops.softmax(v, 1, mask=random(4, 1, seed=1)), (x,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    op = torch.ops.fastgpt.softmax.default
    x = random(2, 3, 4, dtype=dtype)
    opcheck(op, (x.clone().requires_grad_(), None, 1.0, False))
    opcheck(op, (x, random(2, 3, 4), 0.5, True))
    opcheck(torch.ops.fastgpt.softmax_backward.default, (x, ops.softmax(x), 0.5))


def test_compile():
    x = random(4, 6, 9).requires_grad_()
    mask = random(6, 9, seed=3)
    function = lambda v: ops.softmax(v + 1, scale=0.3, mask=mask, is_causal=True).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(function(x).sum(), x))


def test_bad_input():
    with pytest.raises(TypeError, match="int64"):
        ops.softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="is_causal needs two dimensions"):
        ops.softmax(torch.ones(3), is_causal=True)
    with pytest.raises(ValueError, match="does not broadcast"):
        ops.softmax(torch.ones(3), mask=torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="mask requires a gradient"):
        ops.softmax(torch.ones(3, requires_grad=True), mask=torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_large_results_are_those_of_their_parts(isa, dtype, is_causal):
    """From 32 MB on rows are written past the caches."""
    rows = 1040
    heads = 2**25 // (rows * rows * dtype.itemsize) + 1
    x = random(heads, rows, rows, dtype=dtype).requires_grad_()
    mask = random(rows, seed=2)
    grad = random(heads, rows, rows, dtype=dtype, seed=3)
    y = ops.softmax(x, mask=mask, is_causal=is_causal)
    (dx,) = torch.autograd.grad(y, x, grad)
    for part in (0, heads - 1):
        small = x[part].detach().requires_grad_()
        want = ops.softmax(small, mask=mask, is_causal=is_causal)
        assert torch.equal(y[part], want)
        assert torch.equal(dx[part], torch.autograd.grad(want, small, grad[part])[0])
