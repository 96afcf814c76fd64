"""The Triton kernels of activation(x + bias) against the formulas."""

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

TORCH = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def ours(kind):
    options = {"approximate": "tanh"} if kind == "gelu_tanh" else {}
    function = getattr(ops, kind.removesuffix("_tanh"))
    return lambda x, b: function(x, bias=b, **options)


def check(kind, shape, dtype=torch.float32, bias_dtype=None, prepare=lambda x: x):
    check_op(
        lambda x, b: ours(kind)(prepare(x), b),
        lambda x, b: TORCH[kind](prepare(x) + b.to(x.dtype)),
        lambda x, b: reference.bias_activation(prepare(x), b, kind),
        [random(*shape, dtype=dtype, scale=2.0), random(shape[-1], dtype=bias_dtype or dtype, seed=1)],
    )


@pytest.fixture(params=TORCH)
def kind(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 31), (2, 9, 130), (70, 257)], ids=str)
def test_parity(kind, shape, dtype):
    check(kind, shape, dtype)


def test_programs_of_several_steps():
    check("gelu", (700, 20))


def test_a_bias_of_another_dtype_and_strides():
    check("gelu", (17, 40), torch.bfloat16, torch.float32)
    check("tanh", (17, 40), prepare=lambda x: x.t().contiguous().t())


def test_only_one_gradient_and_no_rows():
    x, b = random(6, 20).to(DEVICE), random(20, seed=1).to(DEVICE)
    (alone,) = torch.autograd.grad(ops.silu(x.requires_grad_(), bias=b).sum(), x)
    both = torch.autograd.grad(ops.silu(x, bias=b.requires_grad_()).sum(), (x, b))
    torch.testing.assert_close(alone, both[0], rtol=0, atol=0)
    torch.testing.assert_close(both[1], both[0].sum(0))
    ops.relu(x[:0], bias=b).sum().backward()
    assert (b.grad == 0).all()


def test_opcheck(kind):
    x, b = random(5, 9).to(DEVICE), random(9, seed=1).to(DEVICE)
    opcheck(torch.ops.fastgpt.bias_activation.default, (x, b, kind))
    for needs in (True, False):
        opcheck(torch.ops.fastgpt.bias_activation_backward.default, (x, x, b, kind, needs))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(8192, 3072), (1025, 97)], ids=str)
    def test_parity(self, kind, shape, dtype):
        check(kind, shape, dtype)

    def test_same_bits_every_time(self):
        x, b = random(4097, 768).to(DEVICE).requires_grad_(), random(768, seed=1).to(DEVICE).requires_grad_()
        first = torch.autograd.grad(ops.gelu(x, bias=b).square().sum(), (x, b))
        for _ in range(1000):
            again = torch.autograd.grad(ops.gelu(x, bias=b).square().sum(), (x, b))
            assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
