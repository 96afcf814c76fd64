"""log_softmax: every engine against the formula."""

import pytest
import torch
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def check(x, dim=-1, what=""):
    def formula(v):
        return reference.log_softmax(v.movedim(dim, -1)).movedim(-1, dim)

    check_op(lambda v: ops.log_softmax(v, dim), lambda v: torch.log_softmax(v, dim), formula, [x], what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 7), (4, 16), (2, 3, 65), (70, 128), (3, 5003)], ids=str)
def test_parity(isa, dtype, shape):
    check(random(*shape, dtype=dtype, scale=4.0), what=f"{shape}")


def test_other_dimensions_strides_and_no_elements(isa):
    check(random(4, 5, 6), dim=0)
    check(random(4, 5, 6), dim=1)
    check(random(30, 40).t(), what="transposed")
    assert ops.log_softmax(torch.empty(0, 5)).shape == (0, 5)
    assert ops.log_softmax(torch.empty(5, 0)).shape == (5, 0)
    assert ops.log_softmax(torch.tensor(3.0)) == 0


def test_rows_far_from_zero(isa):
    check(random(4, 50) + 1e6, what="near a million")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(isa, dtype):
    inf, nan = float("inf"), float("nan")
    rows = [[0.0, inf, 1.0], [-inf, 0.0, 1.0], [-inf, -inf, -inf], [nan, 0.0, 1.0], [1e30, 0.0, -1e30]]
    x = torch.tensor(rows, dtype=dtype)
    exact = torch.log_softmax(x.double(), -1)
    assert_parity(ops.log_softmax(x), torch.log_softmax(x, -1), exact, "special values")


def test_same_bits_for_any_number_of_threads(isa):
    x, grad = random(300, 77).requires_grad_(), random(300, 77, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = ops.log_softmax(x)
            results.append([y, torch.autograd.grad(y, x, grad)[0]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck():
    x = random(3, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.log_softmax(x, 1), (x,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    x = random(3, 9, dtype=dtype)
    opcheck(torch.ops.fastgpt.log_softmax.default, (x.clone().requires_grad_(),))
    opcheck(torch.ops.fastgpt.log_softmax_backward.default, (x, x))


def test_compile():
    x = random(5, 24).requires_grad_()
    function = lambda x: ops.log_softmax(x * 2).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    mine, eager = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
    torch.testing.assert_close(mine, eager)


def test_bad_input():
    with pytest.raises(TypeError, match="int64"):
        ops.log_softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        ops.log_softmax(torch.ones(3), 1)
