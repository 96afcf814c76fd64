"""The Triton kernels of log_softmax against the formula."""

import pytest
import torch
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.kernels import log_softmax as kernels
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")


def check(x, dim=-1):
    def formula(v):
        return reference.log_softmax(v.movedim(dim, -1)).movedim(-1, dim)

    check_op(lambda v: ops.log_softmax(v, dim), lambda v: torch.log_softmax(v, dim), formula, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (2, 3, 65), (3, 5003)], ids=str)
def test_parity(dtype, shape):
    check(random(*shape, dtype=dtype, scale=4.0))


@pytest.mark.parametrize("cols", [63, 64, 65, 1000])
def test_rows_of_several_blocks(monkeypatch, cols):
    monkeypatch.setattr(kernels, "BLOCK", 64)
    check(random(5, cols, scale=4.0))
    x = random(2, cols)
    x[:, : cols // 2] = -torch.inf  # whole blocks of it first
    torch.testing.assert_close(there(ops.log_softmax)(x), torch.log_softmax(x, -1))


def test_other_dimensions_strides_and_no_elements():
    check(random(4, 5, 6), dim=0)
    check(random(30, 40).t())
    assert ops.log_softmax(torch.empty(0, 5, device=DEVICE)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype):
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, inf, 1.0], [-inf, 0.0, 1.0], [-inf, -inf, -inf], [nan, 0.0, 1.0], [1e4, 0.0, -1e4]]
    x = torch.tensor(rows, dtype=dtype)
    assert_parity(
        there(ops.log_softmax)(x), torch.log_softmax(x, -1), torch.log_softmax(x.double(), -1), "special values"
    )


def test_opcheck():
    x = random(6, 10).to(DEVICE)
    opcheck(torch.ops.fastgpt.log_softmax.default, (x.requires_grad_(),))
    opcheck(torch.ops.fastgpt.log_softmax_backward.default, (x.detach(), ops.log_softmax(x).detach()))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(16384, 65), (8192, 1024), (1024, 50304), (64, 262144)], ids=str)
    def test_parity(self, dtype, shape):
        check(random(*shape, dtype=dtype))
