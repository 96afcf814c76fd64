"""The Triton kernels of layer_norm against the formula."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")


def check(x, weight=None, bias=None, eps=1e-5):
    def named(leaves):
        rest = list(leaves[1:])
        return leaves[0], rest.pop(0) if weight is not None else None, rest.pop(0) if bias is not None else None

    def formula(*leaves):
        return reference.layer_norm(*named(leaves), eps)[0]

    def through(function):
        return lambda *leaves: function(leaves[0], leaves[0].shape[-1:], *named(leaves)[1:], eps)

    check_op(through(ops.layer_norm), through(F.layer_norm), formula, [p for p in (x, weight, bias) if p is not None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2), (3, 5), (2, 9, 33), (70, 128), (300, 24), (8, 768), (2, 8192), (3, 8193)], ids=str
)
def test_parity(dtype, shape):
    size = shape[-1]
    check(random(*shape, dtype=dtype), random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2))


@pytest.mark.parametrize("shape", [(6, 50), (2, 9000)], ids=str)
def test_without_parameters(shape):
    x, weight, bias = random(*shape), random(shape[-1], seed=1), random(shape[-1], seed=2)
    check(x)
    check(x, weight=weight)
    check(x, bias=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float_parameters(dtype):
    x, weight, bias = random(30, 64, dtype=dtype), random(64, seed=1), random(64, seed=2)
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)[0]
    ours = there(lambda x, w, b: ops.layer_norm(x, (64,), w, b))(x, weight, bias)
    assert_parity(ours, reference.layer_norm(x, weight, bias, 1e-5)[0], exact)
    leaves = [p.to(DEVICE).requires_grad_() for p in (x, weight, bias)]
    grads = torch.autograd.grad(ops.layer_norm(leaves[0], (64,), *leaves[1:]), leaves, x.to(DEVICE))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("cols", [256, 8400])
def test_large_mean_does_not_cancel(cols):
    check(random(3, cols) + 1000.0, random(cols, seed=1), random(cols, seed=2))


def test_constant_rows():
    for cols in (40, 8200):
        y = there(lambda v: ops.layer_norm(v, v.shape[-1:]))(torch.full((4, cols), 3.0))
        torch.testing.assert_close(y, torch.zeros(4, cols))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [33, 8200])
def test_special_values(dtype, cols):
    x = random(4, cols, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    ours = there(lambda v: ops.layer_norm(v, (cols,)))(x)
    assert_parity(ours, F.layer_norm(x, (cols,)), F.layer_norm(x.double(), (cols,)), "special values")


def test_strided_and_empty():
    check(random(40, 30).t(), random(40, seed=1), random(80, seed=2)[::2])
    weight = random(7).to(DEVICE).requires_grad_()
    y = ops.layer_norm(torch.empty(0, 7, device=DEVICE), (7,), weight, None)
    y.sum().backward()
    assert y.shape == (0, 7)
    assert (weight.grad == 0).all()


def test_same_bits_on_every_run():
    leaves = [t.to(DEVICE).requires_grad_() for t in (random(999, 96), random(96, seed=1), random(96, seed=2))]
    grad = random(999, 96, seed=3).to(DEVICE)
    first, second = (torch.autograd.grad(ops.layer_norm(leaves[0], (96,), *leaves[1:]), leaves, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_more_parts_of_the_gradients_than_are_added_in_a_step():
    check(random(40, 1500), random(1500, seed=1), random(1500, seed=2))  # a part for each row, up to 32 a step


def test_opcheck():
    op = torch.ops.fastgpt.layer_norm.default
    x, w, b = (random(*shape, seed=i).to(DEVICE) for i, shape in enumerate([(3, 4, 9), (9,), (9,)]))
    opcheck(op, (x.clone().requires_grad_(), w.clone().requires_grad_(), b.clone().requires_grad_(), 1e-5))
    opcheck(op, (x, None, None, 1e-5))
    _, mean, rstd = op(x, w, b, 1e-5)
    for needs in (True, False):
        opcheck(torch.ops.fastgpt.layer_norm_backward.default, (x, x.clone(), w, mean, rstd, needs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 1024, 768), (4096, 8192), (2048, 12288)], ids=str)
class TestRealSizes:
    pytestmark = gpu

    def test_parity(self, dtype, shape):
        size = shape[-1]
        check(random(*shape, dtype=dtype), random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2))
