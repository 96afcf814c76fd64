"""The Triton kernels of rms_norm, and of both norms after a residual, against the formulas."""

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.kernels import layer_norm as kernels
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

SHAPES = [(1, 2), (2, 3, 65), (20, 96), (2, 300)]


@pytest.fixture(params=["whole rows", "in steps"])
def rows(request, monkeypatch):
    """Rows in one block, and rows that take several steps."""
    if request.param == "in steps":
        monkeypatch.setattr(kernels, "ONE_BLOCK", 0)
        monkeypatch.setattr(kernels, "WIDE_BLOCK", 128)


def check_rms(shape, dtype=torch.float32, has_weight=True):
    leaves = [random(*shape, dtype=dtype, scale=3.0)]
    leaves += [random(shape[-1], dtype=dtype, seed=1)] if has_weight else []
    cols = shape[-1:]
    check_op(
        lambda x, *w: ops.rms_norm(x, cols, *w, eps=1e-5),
        lambda x, *w: F.rms_norm(x, cols, *w, eps=1e-5),
        lambda x, *w: reference.rms_norm(x, *w, *([] if w else [None]), 1e-5)[0],
        leaves,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(rows, shape, dtype):
    check_rms(shape, dtype)


def test_rms_norm_without_a_weight_and_without_rows(rows):
    check_rms((6, 40), has_weight=False)
    assert ops.rms_norm(torch.empty(0, 5, device=DEVICE), (5,)).shape == (0, 5)


def both(norm):
    """normed + 2 * summed of a norm after a residual, so that both have gradients."""

    def function(x, residual, *params):
        normed, summed, *_ = norm(x, residual, *params)
        return normed + 2.0 * summed

    return function


def check_add(name, shape, dtypes, has_params=True):
    x, residual = (random(*shape, dtype=dtype, seed=i, scale=3.0) for i, dtype in enumerate(dtypes))
    cols = shape[-1:]
    params = [random(*cols, seed=2 + i) for i in range(1 if name == "rms" else 2)] if has_params else []
    ours, torchs, formula = {
        "rms": (ops.add_rms_norm, F.rms_norm, reference.add_rms_norm),
        "layer": (ops.add_layer_norm, F.layer_norm, reference.add_layer_norm),
    }[name]
    missing = [None] * ((1 if name == "rms" else 2) - len(params))

    def of_torch(x, residual, *p):
        summed = x + residual
        return torchs(summed.float(), cols, *p, eps=1e-5).to(summed.dtype), summed

    check_op(
        both(lambda x, r, *p: ours(x, r, cols, *p, eps=1e-5)),
        both(of_torch),
        both(lambda x, r, *p: formula(x, r, *p, *missing, 1e-5)),
        [x, residual, *params],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_after_a_residual(rows, name, shape, dtype):
    check_add(name, shape, (dtype, dtype))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_mixed_dtypes_and_no_parameters(rows, name):
    check_add(name, (9, 33), (torch.bfloat16, torch.float32))
    check_add(name, (9, 33), (torch.float32, torch.float32), has_params=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_normalised_is_the_sum_as_it_is_returned(rows, dtype):
    x, residual = (random(6, 130, dtype=dtype, seed=i, scale=3.0).to(DEVICE) for i in range(2))
    normed, summed = ops.add_rms_norm(x, residual, (130,))
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, ops.rms_norm(summed, (130,)))
    normed, summed = ops.add_layer_norm(x, residual, (130,))
    assert torch.equal(normed, ops.layer_norm(summed, (130,)))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_only_the_sum_or_only_the_norm_is_used(name):
    op = ops.add_rms_norm if name == "rms" else ops.add_layer_norm
    x, residual = (random(4, 20, seed=i).to(DEVICE).requires_grad_() for i in range(2))
    op(x, residual, (20,))[1].sum().backward()
    assert (x.grad == 1).all()
    x.grad = None
    op(x, residual, (20,))[0].square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_opcheck():
    x, w = random(6, 10).to(DEVICE), random(10, seed=1).to(DEVICE)
    _, rstd = torch.ops.fastgpt.rms_norm.default(x, w, 1e-5)
    opcheck(torch.ops.fastgpt.rms_norm.default, (x, w, 1e-5))
    opcheck(torch.ops.fastgpt.rms_norm_backward.default, (x, x, w, rstd, True))
    opcheck(torch.ops.fastgpt.add_rms_norm.default, (x, x, w, 1e-5))
    opcheck(torch.ops.fastgpt.add_layer_norm.default, (x, x.bfloat16(), w, w, 1e-5))
    for half in (True, False):
        opcheck(torch.ops.fastgpt.add_rms_norm_backward.default, (x, x, x, w, rstd, True, half))
        opcheck(torch.ops.fastgpt.add_layer_norm_backward.default, (x, None, x, w, rstd, rstd, half, half))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(16384, 768), (1025, 97), (512, 8192), (64, 16384)], ids=str)
    def test_parity(self, shape, dtype):
        check_rms(shape, dtype)
        for name in ("layer", "rms"):
            check_add(name, shape, (dtype, dtype))

    def test_same_bits_every_time(self):
        x, residual = (random(4097, 768, dtype=torch.bfloat16, seed=i).to(DEVICE).requires_grad_() for i in range(2))
        w = random(768, seed=2).to(DEVICE).requires_grad_()
        leaves = (x, residual, w)
        first = torch.autograd.grad(ops.add_rms_norm(x, residual, (768,), w)[0].float().square().sum(), leaves)
        for _ in range(1000):
            again = torch.autograd.grad(ops.add_rms_norm(x, residual, (768,), w)[0].float().square().sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
