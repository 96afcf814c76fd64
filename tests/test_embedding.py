"""embedding: every engine against the formula, and the gradient that goes straight into the one that is there."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, random
from torch.library import opcheck

from fastgpt import nn, ops
from fastgpt.ops import reference


def some_ids(count, rows, seed=7):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed))


def check(ids, weight, padding_idx=None, what=""):
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    grad = random(*ids.shape, weight.shape[1], dtype=weight.dtype, seed=3)
    y = ops.embedding(ids, ours, padding_idx)
    expected = F.embedding(ids, theirs, padding_idx)
    assert torch.equal(y, expected), what
    mine, torchs = torch.autograd.grad(y, ours, grad)[0], torch.autograd.grad(expected, theirs, grad)[0]
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    exact = reference.embedding_backward(grad.double(), ids, weight.shape[0], padding)
    assert_parity(mine, torchs, exact, what)
    ours.grad = random(*weight.shape, dtype=weight.dtype, seed=4)
    into, before = ours.grad, ours.grad.clone()
    ops.embedding(ids, ours, padding_idx, accumulate_grad=True).backward(grad)
    assert ours.grad is into
    assert_parity(into, before + torchs, before.double() + exact, f"{what} into a gradient")
    untouched = torch.ones(weight.shape[0], dtype=torch.bool)
    untouched[ids.flatten().long()] = False
    assert torch.equal(into[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 16, 64, 65, 200])
def test_parity(isa, dtype, cols):
    check(some_ids(50, 30), random(30, cols, dtype=dtype), what=f"{cols} columns")
    check(some_ids(5, 300).view(5, 1), random(300, cols, dtype=dtype), what=f"{cols} columns, few of many rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_id_many_times(isa, dtype):
    check(torch.zeros(3, 400, dtype=torch.int64), random(1, 40, dtype=dtype))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding(isa, padding_idx):
    check(some_ids(60, 8), random(8, 24), padding_idx)
    check(torch.full((4,), padding_idx % 8), random(8, 24), padding_idx, "padding alone")


def test_ids_of_32_bits_strided_and_empty(isa):
    check(some_ids(60, 8).int(), random(8, 24))
    check(some_ids(60, 8).view(6, 10).t(), random(24, 8).t(), what="strided")
    check(torch.empty(0, dtype=torch.int64), random(8, 24), what="no ids")
    assert ops.embedding(torch.empty(2, 0, dtype=torch.int64), random(8, 3)).shape == (2, 0, 3)


def test_same_bits_for_any_number_of_threads(isa):
    ids, weight, grad = some_ids(3000, 100), random(100, 330).requires_grad_(), random(3000, 330, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(ops.embedding(ids, weight), weight, grad)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_tied_weight_gets_both_gradients():
    """As in a GPT: the matrix embeds the ids and multiplies the result."""
    ids, target = some_ids(20, 12), some_ids(20, 12, seed=8)
    grads = []
    for accumulate in (False, True):
        weight = random(12, 8).requires_grad_()
        for _ in range(3):  # the first finds no gradient, the others do
            x = ops.embedding(ids, weight, accumulate_grad=accumulate)
            F.cross_entropy(torch.tanh(x) @ weight.t(), target).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_accumulating_needs_a_leaf_with_a_gradient():
    weight = random(6, 4).requires_grad_()
    ids = some_ids(5, 6)
    y = ops.embedding(ids, weight * 2, accumulate_grad=True)  # no leaf: its gradient goes on through the product
    y.sum().backward()
    expected = torch.autograd.grad(F.embedding(ids, weight * 2).sum(), weight)[0]
    assert torch.equal(weight.grad, expected)


def test_gradcheck():
    weight = random(5, 3, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 4, 4], [2, 0, 0]])
    assert torch.autograd.gradcheck(lambda w: ops.embedding(ids, w), (weight,))
    weight.grad = torch.ones_like(weight)
    ops.embedding(ids, weight, accumulate_grad=True).sum().backward()
    assert torch.equal(weight.grad[:, 0], torch.tensor([4.0, 1.0, 2.0, 1.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    ids, weight = some_ids(10, 6), random(6, 9, dtype=dtype)
    opcheck(torch.ops.fastgpt.embedding.default, (ids, weight.clone().requires_grad_(), -1, False))
    grad = random(10, 9, dtype=dtype)
    opcheck(torch.ops.fastgpt.embedding_backward.default, (grad, ids, 6, -1))
    opcheck(torch.ops.fastgpt.embedding_accumulate_backward.default, (weight.clone(), grad, ids, -1))


def test_compile():
    ids, weight = some_ids(10, 6), random(6, 9).requires_grad_()
    weight.grad = torch.ones_like(weight)
    function = lambda w: ops.embedding(ids, w, accumulate_grad=True).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(weight), function(weight))
    compiled(weight).sum().backward()
    mine, weight.grad = weight.grad, torch.ones_like(weight)
    function(weight).sum().backward()
    torch.testing.assert_close(mine, weight.grad)


def test_the_module(caplog):
    torch.manual_seed(0)
    ours, theirs = nn.Embedding(7, 5, padding_idx=2), torch.nn.Embedding(7, 5, padding_idx=2)
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    ids = some_ids(20, 7)
    for module in (ours, theirs):
        module(ids).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    fast = nn.Embedding(7, 5, padding_idx=2, accumulate_grad=True)
    fast.load_state_dict(ours.state_dict())
    fast.weight.grad = torch.zeros(7, 5)
    kept = fast.weight.grad
    fast(ids).square().sum().backward()
    assert fast.weight.grad is kept
    torch.testing.assert_close(kept, theirs.weight.grad)
    nn.modules._log_fallback.cache_clear()
    sparse = nn.Embedding(7, 5, sparse=True)
    sparse(ids).sum().backward()
    assert sparse.weight.grad.is_sparse
    assert "Embedding with max_norm" in caplog.text


def test_bad_input():
    weight = torch.ones(4, 3)
    for wrong in (4, -1):
        with pytest.raises(IndexError, match=rf"got {wrong}, expected 0 to 3"):
            ops.embedding(torch.tensor([0, wrong]), weight)
    with pytest.raises(TypeError, match="float32"):
        ops.embedding(torch.ones(2), weight)
    with pytest.raises(TypeError, match="int64"):
        ops.embedding(torch.tensor([0]), weight.long())
    with pytest.raises(ValueError, match=r"expected \(V, C\)"):
        ops.embedding(torch.tensor([0]), torch.ones(4))
    with pytest.raises(ValueError, match="padding_idx is 4"):
        ops.embedding(torch.tensor([0]), weight, 4)
