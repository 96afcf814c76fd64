"""The Triton kernel of dropout: the formula's mask, to the bit."""

import pytest
import torch
from parity import random
from triton_engine import DEVICE, DTYPES, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.reference.dropout import philox

pytestmark = pytest.mark.usefixtures("triton_engine")


def formula(x, seed, p, residual=None):
    return reference.dropout(x.cpu(), None if residual is None else residual.cpu(), torch.tensor(seed), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 683), (4, 1025)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_the_formulas_numbers(dtype, shape, p):
    x = random(*shape, dtype=dtype).to(DEVICE)
    torch.testing.assert_close(ops.dropout(x, p, seed=11).cpu(), formula(x, 11, p), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_seeds_of_both_halves(seed):
    x = torch.ones(999, device=DEVICE)
    torch.testing.assert_close(ops.dropout(x, 0.5, seed=seed).cpu(), formula(x, seed, 0.5), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_with_a_residual(dtype, wide):
    x, residual = random(5, 33, dtype=dtype).to(DEVICE), random(5, 33, dtype=wide, seed=1).to(DEVICE)
    ours = ops.dropout_add(x, residual, 0.3, seed=4)
    assert ours.dtype == wide
    torch.testing.assert_close(ours.cpu(), formula(x, 4, 0.3, residual), rtol=1e-6, atol=1e-6)


def test_the_backward_takes_the_same_mask():
    x, grad = random(6, 70).to(DEVICE).requires_grad_(), random(6, 70, seed=1).to(DEVICE)
    ops.dropout(x, 0.4, seed=9).backward(grad)
    torch.testing.assert_close(x.grad.cpu(), formula(grad, 9, 0.4), rtol=0, atol=0)


def test_strides_no_elements_and_dropped_nan():
    x = random(8, 12).to(DEVICE)
    torch.testing.assert_close(
        ops.dropout(x.t(), 0.5, seed=2).cpu(), formula(x.t().contiguous(), 2, 0.5), rtol=0, atol=0
    )
    assert ops.dropout(x[:0], 0.5).shape == (0, 12)
    assert ops.dropout(torch.full((64,), float("nan"), device=DEVICE), 0.5, seed=1).isnan().all()


def test_opcheck():
    x, seed = random(4, 9).to(DEVICE), torch.tensor(3, device=DEVICE)
    for residual in (None, random(4, 9, seed=1).to(DEVICE)):
        opcheck(torch.ops.fastgpt.dropout.default, (x, residual, seed, 0.3))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_formulas_numbers(self, dtype):
        x = random(4096, 1025, dtype=dtype).to(DEVICE)
        torch.testing.assert_close(ops.dropout(x, 0.1, seed=5).cpu(), formula(x, 5, 0.1), rtol=0, atol=0)

    def test_more_than_two_to_the_31_elements(self):
        n, tail = 2**31 + 4096, 64
        y = ops.dropout(torch.ones(n, dtype=torch.bfloat16, device=DEVICE), 0.5, seed=3)
        words = philox(torch.arange((n - tail) // 4, n // 4), torch.tensor(3)).flatten()
        assert ((y[-tail:] != 0).cpu() == (words >= 2**31)).all()
