"""The Triton kernels of relu, sigmoid, tanh, gelu and silu against the formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

ACTIVATIONS = {
    "relu": (ops.relu, F.relu, reference.relu),
    "sigmoid": (ops.sigmoid, torch.sigmoid, reference.sigmoid),
    "tanh": (ops.tanh, torch.tanh, reference.tanh),
    "silu": (ops.silu, F.silu, reference.silu),
    "gelu": (ops.gelu, F.gelu, partial(reference.gelu, approximate="none")),
    "gelu_tanh": tuple(partial(f, approximate="tanh") for f in (ops.gelu, F.gelu, reference.gelu)),
}


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5, 31), (3, 2049)], ids=str)
def test_parity(activation, dtype, shape):
    check_op(*activation, [random(*shape, dtype=dtype, scale=3.0)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_range(activation, dtype):
    """From the smallest to the largest magnitudes, both signs: tails, thresholds, overflow."""
    magnitudes = torch.logspace(-30, 4, 5000, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, torch.linspace(-12, 12, 10000, dtype=torch.float64)]).to(dtype)
    ours, torchs, formula = activation
    assert_parity(there(ours)(x), there(torchs)(x), formula(x.double()), "whole range")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(activation, dtype):
    inf, nan, big = float("inf"), float("nan"), torch.finfo(dtype).max
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-40, big, -big] * 7, dtype=dtype)
    ours, torchs, formula = activation
    assert_parity(there(ours)(x), there(torchs)(x), formula(x.double()), "special values")


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "silu", "gelu"])
def test_small_values_keep_relative_precision(name):
    x = torch.cat([torch.logspace(-20, 0, 2000, dtype=torch.float64), torch.linspace(0.5, 0.7, 500)]).float()
    ours, _, formula = ACTIVATIONS[name]
    exact = formula(x.double())
    assert ((there(ours)(x).double() - exact) / exact).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_strided_and_empty(activation):
    check_op(*activation, [random(6, 10).t()])
    check_op(*activation, [random(8, 12)[:, ::2]])
    assert there(activation[0])(torch.empty(0, 4)).shape == (0, 4)


def test_opcheck():
    x = random(3, 5).to(DEVICE)
    for name, options in (("relu", ()), ("tanh", ()), ("silu", ()), ("gelu", ("tanh",)), ("gelu", ("none",))):
        opcheck(getattr(torch.ops.fastgpt, name).default, (x.clone().requires_grad_(), *options))
        opcheck(getattr(torch.ops.fastgpt, f"{name}_backward").default, (x, x.clone(), *options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 1024, 3072), (65537, 1025)], ids=str)
class TestRealSizes:
    pytestmark = gpu

    def test_parity(self, activation, dtype, shape):
        check_op(*activation, [random(*shape, dtype=dtype, scale=3.0)])
