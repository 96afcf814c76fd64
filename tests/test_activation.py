"""relu, sigmoid, tanh, gelu and silu: every engine against the formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference

ACTIVATIONS = {
    "relu": (ops.relu, F.relu, reference.relu),
    "sigmoid": (ops.sigmoid, torch.sigmoid, reference.sigmoid),
    "tanh": (ops.tanh, torch.tanh, reference.tanh),
    "silu": (ops.silu, F.silu, reference.silu),
    "gelu": (ops.gelu, F.gelu, partial(reference.gelu, approximate="none")),
    "gelu_tanh": tuple(partial(f, approximate="tanh") for f in (ops.gelu, F.gelu, reference.gelu)),
}
SHAPES = [(), (1,), (3,), (16,), (17,), (5, 31), (2, 3, 127), (4, 20001)]


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(activation, isa, dtype, shape):
    check_op(*activation, [random(*shape, dtype=dtype, scale=3.0)], what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_range(activation, isa, dtype):
    """A million values from the smallest to the largest magnitudes, both signs: tails, thresholds, overflow."""
    magnitudes = torch.logspace(-30, 4, 250_000, dtype=torch.float64)
    middle = torch.linspace(-12, 12, 500_000, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, middle]).to(dtype)
    ours, torchs, formula = activation
    assert_parity(ours(x), torchs(x), formula(x.double()), "whole range")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(activation, isa, dtype):
    x = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38] * 7, dtype=dtype
    )
    ours, torchs, formula = activation
    assert_parity(ours(x), torchs(x), formula(x.double()), "special values")


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "silu", "gelu"])
def test_small_values_keep_relative_precision(name, isa):
    x = torch.logspace(-20, -3, 1000, dtype=torch.float64).float()
    ours, _, formula = ACTIVATIONS[name]
    exact = formula(x.double())
    assert ((ours(x).double() - exact) / exact).abs().max() < 4 * torch.finfo(torch.float32).eps


def test_gradcheck(activation):
    x = random(3, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(activation[0], (x,))


def test_strided_and_empty(activation, isa):
    check_op(*activation, [random(6, 10).t()], what="transposed")
    check_op(*activation, [random(8, 12)[:, ::2]], what="every other column")
    assert activation[0](torch.empty(0, 4)).shape == (0, 4)


def test_huge(isa):
    x = random(1 << 22).repeat(4)  # more than one chunk for each of any number of threads
    assert_parity(ops.gelu(x), F.gelu(x), reference.gelu(x.double(), "none"), "huge")


def test_half_and_double_go_to_the_formula(activation):
    for dtype in (torch.float16, torch.float64):
        check_op(*activation, [random(50, dtype=dtype)], what=str(dtype))


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "silu"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(name, dtype):
    op = getattr(torch.ops.fastgpt, name).default
    opcheck(op, (random(3, 5, dtype=dtype).requires_grad_(),))
    opcheck(op, (random(5, 3, dtype=dtype).t(),))
    backward = getattr(torch.ops.fastgpt, f"{name}_backward").default
    opcheck(backward, (random(3, 5, dtype=dtype), random(3, 5, dtype=dtype)))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_opcheck_gelu(approximate):
    opcheck(torch.ops.fastgpt.gelu.default, (random(3, 5).requires_grad_(), approximate))
    opcheck(torch.ops.fastgpt.gelu_backward.default, (random(3, 5), random(3, 5), approximate))


def test_compile(activation):
    ours = activation[0]
    x = random(4, 33).requires_grad_()
    compiled = torch.compile(lambda x: ours(x * 2) + 1, fullgraph=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    eager = ours(x * 2) + 1
    (eager_grad,) = torch.autograd.grad(eager.sum(), x)
    torch.testing.assert_close(y, eager)
    torch.testing.assert_close(grad, eager_grad)


def test_autocast_keeps_the_dtype(activation):
    with torch.autocast("cpu", torch.bfloat16):
        assert activation[0](random(4)).dtype == torch.float32
        assert activation[0](random(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(TypeError, match=r"relu: input has dtype torch\.int64"):
        ops.relu(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        ops.gelu(torch.ones(3), approximate="erf")
