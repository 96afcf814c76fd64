"""relu, sigmoid, tanh, gelu and silu with a bias: every engine against the formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference

FUNCTIONS = {
    "relu": (ops.relu, torch.relu),
    "sigmoid": (ops.sigmoid, torch.sigmoid),
    "tanh": (ops.tanh, torch.tanh),
    "gelu": (ops.gelu, F.gelu),
    "gelu_tanh": (partial(ops.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "silu": (ops.silu, F.silu),
}


@pytest.fixture(params=FUNCTIONS)
def kind(request):
    return request.param


def functions(kind):
    """Ours, torch's two steps and the formula, each of (x, bias)."""
    ours, torchs = FUNCTIONS[kind]
    return (
        lambda x, b: ours(x, bias=b),
        lambda x, b: torchs(x + b.to(x.dtype)),
        lambda x, b: reference.bias_activation(x, b, kind),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 31), (2, 3, 127), (40, 64), (3, 9001)], ids=str)
def test_parity(kind, isa, dtype, shape):
    inputs = [random(*shape, dtype=dtype, scale=2.0), random(shape[-1], dtype=dtype, seed=1)]
    check_op(*functions(kind), inputs, what=f"{shape}")


def test_half_input_with_float_bias(kind, isa):
    check_op(*functions(kind), [random(30, 40, dtype=torch.bfloat16), random(40, seed=1)], what="bf16, fp32 bias")


def test_the_sum_is_not_rounded(kind, isa):
    x, b = torch.full((1, 40), 256.0, dtype=torch.bfloat16), torch.full((40,), -255.5)
    expected = reference.bias_activation(x.double(), b.double(), kind)
    torch.testing.assert_close(FUNCTIONS[kind][0](x, bias=b).double(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(kind, isa, dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, -1e30, 3.0], dtype=dtype)
    x, bias = values[:, None].expand(7, 7).contiguous(), values
    ours, torchs, formula = functions(kind)
    assert_parity(ours(x, bias), torchs(x, bias), formula(x.double(), bias.double()), "special values")


def test_strided_and_empty(kind, isa):
    check_op(*functions(kind), [random(6, 10).t(), random(12, seed=1)[::2]], what="strided")
    for shape in ((0, 4), (4, 0)):
        x, b = torch.empty(shape).requires_grad_(), torch.zeros(shape[-1]).requires_grad_()
        FUNCTIONS[kind][0](x, bias=b).sum().backward()
        assert (b.grad == 0).all()


def test_same_bits_for_any_number_of_threads(kind, isa):
    inputs, grad = [random(999, 96), random(96, seed=1)], random(999, 96, seed=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = FUNCTIONS[kind][0](leaves[0], bias=leaves[1])
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(kind):
    inputs = [random(3, 5, dtype=torch.float64).requires_grad_(), random(5, dtype=torch.float64, seed=1)]
    inputs[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: FUNCTIONS[kind][0](x, bias=b), inputs)


def test_only_the_gradients_asked_for(kind):
    x, b = random(4, 8), random(8, seed=1)
    leaf_x, leaf_b = x.clone().requires_grad_(), b.clone().requires_grad_()
    ours = FUNCTIONS[kind][0]
    both = torch.autograd.grad(ours(leaf_x, bias=leaf_b).sum(), (leaf_x, leaf_b))
    torch.testing.assert_close(torch.autograd.grad(ours(leaf_x, bias=b).sum(), leaf_x), both[:1], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours(x, bias=leaf_b).sum(), leaf_b), both[1:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(kind, dtype):
    x, b = random(3, 5, dtype=dtype), random(5, dtype=dtype, seed=1)
    opcheck(torch.ops.fastgpt.bias_activation.default, (x.clone().requires_grad_(), b.clone().requires_grad_(), kind))
    for needs in (True, False):
        opcheck(torch.ops.fastgpt.bias_activation_backward.default, (x, x, b, kind, needs))


def test_compile(kind):
    inputs = [random(4, 33).requires_grad_(), random(33, seed=1).requires_grad_()]
    function = lambda x, b: FUNCTIONS[kind][0](x * 2, bias=b) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    mine = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*inputs).sum(), inputs))


def test_bad_input():
    with pytest.raises(ValueError, match=r"relu: bias has shape \(3,\), expected the input's last size \(4,\)"):
        ops.relu(torch.ones(3, 4), bias=torch.ones(3))
    with pytest.raises(ValueError, match="bias has shape"):
        ops.tanh(torch.tensor(1.0), bias=torch.ones(1))
    with pytest.raises(TypeError, match=r"gelu: bias has dtype torch\.int64"):
        ops.gelu(torch.ones(3, 4), bias=torch.ones(4, dtype=torch.int64))
