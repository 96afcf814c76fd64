"""dropout and dropout_add: every engine against the formula, and the formula's random numbers against published ones."""

import math

import pytest
import torch
from parity import DTYPES, assert_parity, random
from torch.library import opcheck

from fastgpt import nn, ops
from fastgpt.ops import reference

SEED = torch.tensor(1234567890123456789)


def test_the_random_numbers_are_philox4x32_10():
    # The first known answer of the authors' own test vectors (Random123, kat_vectors): counter 0, key 0.
    words = reference.philox(torch.tensor([0]), torch.tensor(0))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    words = reference.philox(torch.arange(1 << 14), SEED).double() / 2**32
    assert abs(float(words.mean()) - 0.5) < 5 / math.sqrt(12 * words.numel())
    assert abs(float((words[:, 0] * words[:, 1]).mean()) - 0.25) < 5 * 0.22 / math.sqrt(words.shape[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (31,), (32,), (33,), (3, 7, 11), (1001,), (50, 768)], ids=str)
def test_parity(isa, dtype, shape):
    for p in (0.1, 0.5, 0.9):
        x, residual, grad = (random(*shape, dtype=dtype, seed=s) for s in range(3))
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = ops.dropout(leaves[0], p, seed=int(SEED))
        exact = reference.dropout(x.double(), None, SEED, p)
        rounded = reference.dropout(x, None, SEED, p)
        assert_parity(y, rounded, exact, f"{shape} {p}")
        assert torch.equal(y == 0, exact == 0)
        (dx,) = torch.autograd.grad(y, leaves[0], grad)
        assert torch.equal(dx, ops.dropout(grad, p, seed=int(SEED)))
        total = ops.dropout_add(*leaves, p, seed=int(SEED))
        assert_parity(total, rounded + residual, exact + residual.double(), f"{shape} {p} with a residual")
        assert torch.equal(torch.autograd.grad(total, leaves, grad)[0], dx)
        assert torch.equal(torch.autograd.grad(ops.dropout_add(*leaves, p, seed=SEED), leaves, grad)[1], grad)


def test_both_halves_of_the_key(isa):
    for seed in (0, 1, 2**32, 2**63 - 1, 0xDEADBEEF12345678 - 2**64):
        kept = ops.dropout(torch.ones(4097), 0.3, seed=torch.tensor(seed)) != 0
        assert torch.equal(kept, reference.dropout_mask((4097,), torch.tensor(seed), 0.3)), seed


def test_a_half_input_on_a_float_residual(isa):
    x, residual = random(9, 40, dtype=torch.bfloat16), random(9, 40, seed=1)
    leaf = x.clone().requires_grad_()
    y = ops.dropout_add(leaf, residual, 0.25, seed=3)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, residual + ops.dropout(x.float(), 0.25, seed=3))
    (dx,) = torch.autograd.grad(y, leaf, residual)
    assert torch.equal(dx, ops.dropout(residual.bfloat16(), 0.25, seed=3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_share_that_is_dropped(p):
    n = 200_000
    dropped = float((ops.dropout(torch.ones(n), p, seed=5) == 0).double().mean())
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5
    rows = (ops.dropout(torch.ones(400, 500), p, seed=6) == 0).double()
    assert (rows.mean(0) - p).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5


def test_seeds():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first, second = ops.dropout(x), ops.dropout(x)
    torch.manual_seed(1)
    assert torch.equal(ops.dropout(x), first)
    assert not torch.equal(first, second)
    assert not torch.equal(ops.dropout(x, seed=1), ops.dropout(x, seed=2))
    assert torch.equal(ops.dropout(x, seed=7), ops.dropout(x, seed=torch.tensor(7)))


def test_same_mask_for_any_number_of_threads_and_every_instruction_set(isa):
    x = random(100_003)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.dropout(x, 0.4, seed=11))
    finally:
        torch.set_num_threads(before)
    expected = reference.dropout(x, None, torch.tensor(11), 0.4)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0] == 0, expected == 0)


def test_what_does_nothing_and_what_drops_all():
    x = random(20)
    assert ops.dropout(x, 0.3, training=False) is x
    assert ops.dropout(x, 0.0) is x
    assert (ops.dropout(x, 1.0) == 0).all()
    assert torch.equal(ops.dropout_add(x, x, 1.0), x)
    assert torch.equal(ops.dropout_add(x, x, 0.3, training=False), 2 * x)
    assert ops.dropout(torch.empty(0, 3), 0.3).shape == (0, 3)


def test_special_values_and_strides(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 1.0] * 30)
    assert_parity(ops.dropout(x, 0.5, seed=1), x, reference.dropout(x.double(), None, torch.tensor(1), 0.5))
    x = random(30, 40)
    assert torch.equal(ops.dropout(x.t(), 0.5, seed=1), ops.dropout(x.t().contiguous(), 0.5, seed=1))


def test_gradcheck():
    x = random(4, 7, dtype=torch.float64).requires_grad_()
    r = random(4, 7, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.3, seed=2), (x,))
    assert torch.autograd.gradcheck(lambda x, r: ops.dropout_add(x, r, 0.3, seed=2), (x, r))
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, 0.3, seed=2), (x,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    op, x = torch.ops.fastgpt.dropout.default, random(3, 9, dtype=dtype)
    opcheck(op, (x.clone().requires_grad_(), None, SEED, 0.3))
    opcheck(op, (x.clone().requires_grad_(), x.clone().requires_grad_(), SEED, 0.3))


def test_compile():
    x = random(50, 24).requires_grad_()
    function = lambda x: ops.dropout(x * 2, 0.3, seed=4).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    mine, eager = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
    torch.testing.assert_close(mine, eager)
    drawn = torch.compile(lambda x: ops.dropout(x, 0.3), fullgraph=True)
    torch.manual_seed(1)
    first, second = drawn(x), drawn(x)
    torch.manual_seed(1)
    assert torch.equal(drawn(x), first)
    assert not torch.equal(first, second)
    (dx,) = torch.autograd.grad(first, x, torch.ones_like(x))
    assert torch.equal(dx == 0, first == 0)


def test_the_module(caplog):
    x = torch.ones(100, requires_grad=True)
    module = nn.Dropout(0.5)
    assert repr(module) == repr(torch.nn.Dropout(0.5))
    y = module(x)
    assert set(y.tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert module.eval()(x) is x
    nn.modules._log_fallback.cache_clear()
    in_place = torch.ones(8)
    assert nn.Dropout(0.5, inplace=True)(in_place) is in_place
    assert "Dropout(inplace=True)" in caplog.text


def test_bad_input():
    x = torch.ones(3)
    with pytest.raises(TypeError, match="int64"):
        ops.dropout(torch.ones(3, dtype=torch.int64))
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            ops.dropout(x, p)
    with pytest.raises(ValueError, match="expected 0 to 2"):
        ops.dropout(x, seed=-1)
    with pytest.raises(TypeError, match="float"):
        ops.dropout(x, seed=1.5)
    with pytest.raises(ValueError, match="scalar int64"):
        ops.dropout(x, seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="residual has shape"):
        ops.dropout_add(x, torch.ones(1))
    with pytest.raises(TypeError, match="residual has dtype"):
        ops.dropout_add(x, x.bfloat16())
