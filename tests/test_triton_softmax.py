"""The Triton kernels of softmax against the formula."""

import pytest
import torch
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")


def torch_softmax(x, mask=None, scale=1.0, is_causal=False):
    v = x * scale
    if mask is not None:
        v = v + mask.to(v)
    if is_causal:
        seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(x.shape[-1] - x.shape[-2])
        v = v.masked_fill(~seen, -torch.inf)
    return torch.softmax(v, -1)


def check(x, mask=None, scale=1.0, is_causal=False):
    check_op(
        lambda v: ops.softmax(v, mask=None if mask is None else mask.to(v.device), scale=scale, is_causal=is_causal),
        lambda v: torch_softmax(v, mask, scale, is_causal),
        lambda v: reference.softmax(v, mask, scale, is_causal),
        [x],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (7, 17), (130, 16), (3, 5, 100), (2, 2, 2, 3, 33), (2, 2049)], ids=str)
def test_parity(dtype, shape):
    check(random(*shape, dtype=dtype, scale=4.0), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [16384, 16385, 40001])
def test_around_the_widest_block(dtype, cols):
    check(random(2, cols, dtype=dtype), scale=-1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (9, 40), (3, 16400)], ids=str)
def test_causal(dtype, queries, keys):
    check(random(2, 3 if keys < 100 else 1, queries, keys, dtype=dtype), is_causal=True, scale=0.3)


def test_causal_rows_that_see_nothing_are_nan():
    x = random(5, 3)
    y = there(lambda v: ops.softmax(v, is_causal=True))(x)
    assert y[:2].isnan().all()
    torch.testing.assert_close(y[2:], torch_softmax(x, is_causal=True)[2:])


@pytest.mark.parametrize("cols", [5, 20000])
def test_rows_of_minus_infinity_are_nan(cols):
    x = random(3, cols)
    x[1] = -torch.inf
    y = there(ops.softmax)(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[::2], torch.softmax(x[::2], -1))


MASKS = [(7, 33), (33,), (1, 33), (7, 1), (4, 1, 1, 33), (1, 3, 7, 33), (4, 3, 7, 33), (4, 3, 7, 1)]


@pytest.mark.parametrize("mask_shape", MASKS, ids=str)
def test_masks_broadcast(mask_shape):
    for dtype in DTYPES:
        check(random(4, 3, 7, 33, dtype=dtype), mask=random(*mask_shape, seed=5, dtype=dtype), scale=0.7)


def test_masks_with_strides_and_more_dimensions():
    check(random(5, 7, 9), mask=random(9, 7, seed=5).t(), scale=0.7)
    check(random(2, 2, 3, 4, 5), mask=random(2, 1, 3, 1, 5, seed=5))


def test_wide_mask():
    check(random(2, 2, 2, 16400), mask=random(2, 1, 1, 16400, seed=5), scale=0.7)
    check(random(2, 2, 2, 16400), mask=random(2, 2, 2, 1, seed=5), is_causal=True)


def test_bool_mask_that_hides_the_first_block_of_a_wide_row():
    x, keep = random(2, 20000), torch.arange(20000) > 9000
    y = there(lambda v: ops.softmax(v, mask=keep.to(v.device)))(x)
    torch.testing.assert_close(y, torch.softmax(x.masked_fill(~keep, -torch.inf), -1))
    assert (y[:, ~keep] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("repeats", [11, 6000])
def test_special_values(dtype, repeats):
    inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
    rows = [
        [0.0, inf, 1],
        [-inf, 0, 1],
        [-inf, -inf, -inf],
        [nan, 0, 1],
        [inf, inf, 0],
        [big, -big, 0],
        [1e4, 1e4, 1e4],
    ]
    x = torch.tensor(rows, dtype=dtype).repeat(1, repeats)
    assert_parity(there(ops.softmax)(x), torch.softmax(x, -1), torch.softmax(x.double(), -1), "special values")


def test_strided_and_empty():
    check(random(40, 30).t())
    check(random(8, 64)[:, ::2])
    assert there(ops.softmax)(torch.empty(0, 5)).shape == (0, 5)
    assert there(ops.softmax)(torch.empty(5, 0)).shape == (5, 0)
    assert there(ops.softmax)(torch.tensor(3.0)).item() == 1.0


def test_opcheck():
    op = torch.ops.fastgpt.softmax.default
    x, mask = random(3, 4, 5).to(DEVICE), random(4, 1).to(DEVICE)
    opcheck(op, (x.clone().requires_grad_(), mask, 0.5, True))
    opcheck(torch.ops.fastgpt.softmax_backward.default, (x, torch.softmax(x, -1), 0.5))


def test_float64_is_refused_where_the_engine_is_forced():
    with pytest.raises(NotImplementedError, match=r"does not cover this: dtype torch\.float64"):
        ops.softmax(random(3, dtype=torch.float64).to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(8192, 1024), (4096, 4096), (1024, 16384), (512, 50304), (8, 12, 1024, 1024)], ids=str
)
@pytest.mark.parametrize("is_causal", [False, True])
class TestRealSizes:
    pytestmark = gpu

    def test_parity(self, dtype, shape, is_causal):
        check(random(*shape, dtype=dtype), is_causal=is_causal, scale=0.125)
