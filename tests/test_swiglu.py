"""swiglu and geglu: every engine against the formula, on two tensors and on the halves of one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.swiglu import _rows

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
@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (5, 31), (2, 3, 127), (4, 20001)], ids=str)
def test_parity(gated, isa, dtype, shape):
    check_op(*gated, [random(*shape, dtype=dtype, scale=2.0), random(*shape, dtype=dtype, seed=1)], what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2,), (6, 34), (3, 2, 66), (70, 1000)], ids=str)
def test_halves_of_one_tensor(gated, isa, dtype, shape):
    both = random(*shape, dtype=dtype, scale=2.0)
    split = [lambda x, f=f: f(*x.chunk(2, -1)) for f in gated[1:]]
    check_op(lambda x: gated[0](x), *split, [both], what="packed")
    check_op(lambda x: gated[0](*x.chunk(2, -1)), *split, [both], what="two views")


@pytest.mark.parametrize("shape", [(6, 34), (3, 2, 66)], ids=str)
def test_halves_are_not_copied(shape):
    for half in torch.empty(shape).chunk(2, -1):
        kept, step = _rows(half)
        assert kept is half
        assert step == shape[-1]


def test_other_strides(gated, isa):
    a, b = random(6, 10), random(10, 6, seed=1)
    check_op(*gated, [a, b.t()], what="transposed up")
    check_op(*gated, [random(8, 12)[:, ::2], random(8, 6, seed=1)], what="every other column")
    check_op(*gated, [random(4, 6, 5).transpose(0, 1), random(6, 4, 5, seed=1)], what="uneven rows")
    row = random(1, 5)
    assert torch.equal(gated[0](row.expand(4, 5), b[:4, :5]), gated[0](row.repeat(4, 1), b[:4, :5]))
    for empty in ((0, 4), (4, 0)):
        assert gated[0](torch.empty(empty), torch.empty(empty)).shape == empty
    leaf = torch.empty(3, 0).requires_grad_()
    gated[0](leaf).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(gated, isa, dtype):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, -1e30, 3.0], dtype=dtype)
    gate, up = (x.contiguous().flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    exact = gated[2](gate.double(), up.double())
    assert_parity(gated[0](gate, up), gated[1](gate, up), exact, "special values")


def test_same_bits_for_any_number_of_threads(gated, isa):
    inputs, grad = [random(999, 96), random(999, 96, seed=1)], random(999, 96, seed=3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = gated[0](*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(gated):
    inputs = [random(3, 8, dtype=torch.float64).requires_grad_(), random(3, 8, dtype=torch.float64, seed=1)]
    inputs[1].requires_grad_()
    assert torch.autograd.gradcheck(gated[0], inputs)
    assert torch.autograd.gradcheck(lambda x: gated[0](x), inputs[:1])


def test_half_and_double_go_to_the_formula(gated):
    for dtype in (torch.float16, torch.float64):
        check_op(*gated, [random(50, dtype=dtype), random(50, dtype=dtype, seed=1)], what=str(dtype))


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(name, dtype):
    op, backward = (getattr(torch.ops.fastgpt, stem).default for stem in (name, f"{name}_backward"))
    options = () if name == "swiglu" else ("tanh",)
    gate, up = random(3, 4, dtype=dtype), random(3, 4, dtype=dtype, seed=1)
    opcheck(op, (gate.clone().requires_grad_(), up.clone().requires_grad_(), *options))
    opcheck(op, (gate.clone().requires_grad_(), None, *options))
    opcheck(op, (*random(3, 8, dtype=dtype).chunk(2, -1), *options))
    opcheck(backward, (gate, gate, up, *options))
    opcheck(backward, (gate[:, :2], up, None, *options))


def test_compile(gated):
    inputs = [random(4, 34).requires_grad_(), random(4, 17, seed=1).requires_grad_()]

    def function(both, up):
        return gated[0](both * 2) + gated[0](*both.chunk(2, -1)) * gated[0](up, up + 1)

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    mine = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*inputs).sum(), inputs))


def test_autocast_keeps_the_dtype(gated):
    with torch.autocast("cpu", torch.bfloat16):
        assert gated[0](random(4)).dtype == torch.float32
        assert gated[0](random(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"swiglu: up has shape \(4,\), expected the gate's \(3, 4\)"):
        ops.swiglu(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"got shape \(3,\), expected an even last size"):
        ops.swiglu(torch.ones(3))
    with pytest.raises(ValueError, match="gate is a scalar"):
        ops.swiglu(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"up has dtype torch\.bfloat16"):
        ops.geglu(x, x.bfloat16())
    with pytest.raises(TypeError, match=r"gate has dtype torch\.int64"):
        ops.swiglu(x.long(), x)
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        ops.geglu(x, x, approximate="erf")
