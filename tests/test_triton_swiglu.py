"""The Triton kernels of swiglu and geglu against the formulas, on two tensors and on the halves of one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

GATED = {
    "swiglu": (ops.swiglu, lambda g, u: F.silu(g) * u, reference.swiglu),
    "geglu": (ops.geglu, lambda g, u: F.gelu(g) * u, partial(reference.geglu, approximate="none")),
    "geglu_tanh": (
        partial(ops.geglu, approximate="tanh"),
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        partial(reference.geglu, approximate="tanh"),
    ),
}


@pytest.fixture(params=GATED)
def gated(request):
    return GATED[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 31), (2, 3, 127), (3, 2049)], ids=str)
def test_parity(gated, dtype, shape):
    check_op(*gated, [random(*shape, dtype=dtype, scale=2.0), random(*shape, dtype=dtype, seed=1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (6, 34), (3, 2, 66), (70, 1000), (3, 4098)], ids=str)
def test_halves_of_one_tensor(gated, dtype, shape):
    """Gate and up in one tensor, and as two views of one; tiles of several rows, and several tiles a row."""
    both = random(*shape, dtype=dtype, scale=2.0)
    split = [lambda x, f=f: f(*x.chunk(2, -1)) for f in gated[1:]]
    check_op(lambda x: gated[0](x), *split, [both], what="packed")
    check_op(lambda x: gated[0](*x.chunk(2, -1)), *split, [both], what="two views")


def test_other_strides(gated):
    check_op(*gated, [random(6, 10), random(10, 6, seed=1).t()], what="transposed up")
    check_op(*gated, [random(8, 12)[:, ::2], random(8, 6, seed=1)], what="every other column")
    check_op(*gated, [random(4, 6, 5).transpose(0, 1), random(6, 4, 5, seed=1)], what="uneven rows")
    row, up = random(1, 5), random(4, 5, seed=1)
    assert torch.equal(there(lambda g, u: gated[0](g.expand(4, 5), u))(row, up), there(gated[0])(row.repeat(4, 1), up))


def test_empty(gated):
    for shape in ((0, 4), (4, 0)):
        assert there(gated[0])(torch.empty(shape), torch.empty(shape)).shape == shape
    leaf = torch.empty(3, 0, device=DEVICE).requires_grad_()
    gated[0](leaf).sum().backward()
    assert leaf.grad.shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(gated, dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, -1e30, 3.0], dtype=dtype)
    gate, up = (x.contiguous().flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    exact = gated[2](gate.double(), up.double())
    assert_parity(there(gated[0])(gate, up), there(gated[1])(gate, up), exact, "special values")


def test_opcheck():
    gate, up = random(3, 4).to(DEVICE), random(3, 4, seed=1).to(DEVICE)
    for name, options in (("swiglu", ()), ("geglu", ("tanh",)), ("geglu", ("none",))):
        op, backward = (getattr(torch.ops.fastgpt, stem).default for stem in (name, f"{name}_backward"))
        opcheck(op, (gate.clone().requires_grad_(), up.clone().requires_grad_(), *options))
        opcheck(op, (gate, None, *options))
        opcheck(backward, (gate, gate.clone(), up, *options))
        opcheck(backward, (gate[:, :2], up, None, *options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 1024, 2048), (4096, 11008)], ids=str)
class TestRealSizes:
    pytestmark = gpu

    def test_parity(self, gated, dtype, shape):
        check_op(*gated, [random(*shape, dtype=dtype, scale=2.0), random(*shape, dtype=dtype, seed=1)])

    def test_halves_of_one_tensor(self, gated, dtype, shape):
        split = [lambda x, f=f: f(*x.chunk(2, -1)) for f in gated[1:]]
        check_op(lambda x: gated[0](x), *split, [random(*shape, dtype=dtype, scale=2.0)])
