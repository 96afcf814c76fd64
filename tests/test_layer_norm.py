"""layer_norm: every engine against the formula."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def check(x, weight=None, bias=None, eps=1e-5, what=""):
    params = [p for p in (weight, bias) if p is not None]

    def named(*leaves):
        rest = list(leaves[1:])
        return leaves[0], rest.pop(0) if weight is not None else None, rest.pop(0) if bias is not None else None

    def ours(*leaves):
        v, w, b = named(*leaves)
        return ops.layer_norm(v, v.shape[-1:], w, b, eps)

    def torchs(*leaves):
        v, w, b = named(*leaves)
        return F.layer_norm(v, v.shape[-1:], w, b, eps)

    check_op(ours, torchs, lambda *leaves: reference.layer_norm(*named(*leaves), eps)[0], [x, *params], what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (4, 16), (2, 9, 33), (70, 128), (3, 768), (1, 40001)], ids=str)
def test_parity(isa, dtype, shape):
    size = shape[-1]
    check(
        random(*shape, dtype=dtype),
        random(size, dtype=dtype, seed=1),
        random(size, dtype=dtype, seed=2),
        what=f"{shape}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_parameters(isa, dtype):
    x = random(6, 50, dtype=dtype)
    check(x, what="plain")
    check(x, weight=random(50, dtype=dtype, seed=1), what="no bias")


def test_half_input_with_float_parameters(isa):
    x, w, b = random(30, 64, dtype=torch.bfloat16), random(64, seed=1), random(64, seed=2)
    check(x, w, b, what="bf16 with fp32 parameters")


def test_large_mean_does_not_cancel(isa):
    x = random(8, 256) + 1000.0
    check(x, random(256, seed=1), random(256, seed=2), what="mean 1000")


def test_constant_rows(isa):
    x = torch.full((4, 40), 3.0)
    torch.testing.assert_close(ops.layer_norm(x, (40,)), torch.zeros(4, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(isa, dtype):
    x = random(4, 33, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5] = float("nan"), float("inf"), -float("inf")
    assert_parity(ops.layer_norm(x, (33,)), F.layer_norm(x, (33,)), F.layer_norm(x.double(), (33,)), "special values")


def test_several_dimensions(isa):
    x, w, b = random(5, 4, 6), random(4, 6, seed=1), random(4, 6, seed=2)
    check_op(
        lambda x, w, b: ops.layer_norm(x, (4, 6), w, b),
        lambda x, w, b: F.layer_norm(x, (4, 6), w, b),
        lambda x, w, b: F.layer_norm(x, (4, 6), w, b),
        [x, w, b],
    )


def test_strided_and_empty(isa):
    check(random(40, 30).t(), random(40, seed=1), random(40, seed=2), what="transposed")
    w = random(7).requires_grad_()
    y = ops.layer_norm(torch.empty(0, 7), (7,), w, None)
    y.sum().backward()
    assert y.shape == (0, 7)
    assert w.grad is not None
    assert (w.grad == 0).all()


def test_same_bits_for_any_number_of_threads(isa):
    x, w, b = random(999, 96), random(96, seed=1), random(96, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            y = ops.layer_norm(leaves[0], (96,), leaves[1], leaves[2])
            results.append([y, *torch.autograd.grad(y, leaves, random(999, 96, seed=3))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck():
    leaves = [
        t.requires_grad_()
        for t in (random(3, 4, 5, dtype=torch.float64), random(5, dtype=torch.float64), random(5, dtype=torch.float64))
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: ops.layer_norm(x, (5,), w, b), leaves)
    assert torch.autograd.gradcheck(lambda x: ops.layer_norm(x, (5,)), leaves[:1])


def test_only_the_gradients_asked_for():
    x, w, b = random(4, 8), random(8, seed=1).requires_grad_(), random(8, seed=2)
    y = ops.layer_norm(x, (8,), w, b)
    y.sum().backward()
    assert x.grad is None
    assert b.grad is None
    assert w.grad is not None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    op = torch.ops.fastgpt.layer_norm.default
    x, w, b = random(3, 4, 9, dtype=dtype), random(9, dtype=dtype), random(9, dtype=dtype)
    opcheck(op, (x.clone().requires_grad_(), w.clone().requires_grad_(), b.clone().requires_grad_(), 1e-5))
    opcheck(op, (x, None, None, 1e-5))
    _, mean, rstd = op(x, w, b, 1e-5)
    for needs in (True, False):
        opcheck(torch.ops.fastgpt.layer_norm_backward.default, (x, x, w, mean, rstd, needs))


def test_compile():
    x, w, b = (t.requires_grad_() for t in (random(5, 24), random(24, seed=1), random(24, seed=2)))
    function = lambda x, w, b: ops.layer_norm(x * 2, (24,), w, b).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b), function(x, w, b))
    mine = torch.autograd.grad(compiled(x, w, b).sum(), (x, w, b))
    torch.testing.assert_close(mine, torch.autograd.grad(function(x, w, b).sum(), (x, w, b)))


def test_bad_input():
    with pytest.raises(ValueError, match="normalized_shape"):
        ops.layer_norm(torch.ones(3, 4), (3,))
    with pytest.raises(ValueError, match="weight has shape"):
        ops.layer_norm(torch.ones(3, 4), (4,), torch.ones(3))
    with pytest.raises(TypeError, match="int32"):
        ops.layer_norm(torch.ones(3, 4, dtype=torch.int32), (4,))
