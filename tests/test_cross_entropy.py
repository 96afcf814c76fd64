"""cross_entropy: every engine against the formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def targets(rows, classes, ignored=(), seed=7):
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    for i in ignored:
        target[i] = -100
    return target


def check(logits, target, what="", **options):
    filled = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0} | options
    check_op(
        lambda x: ops.cross_entropy(x, target, **options),
        # torch rounds a half-type loss to its dtype; ours stays in float32, so torch's side is compared in float32 too
        lambda x: F.cross_entropy(x.float() if x.dtype == torch.bfloat16 else x, target, **options),
        lambda x: reference.cross_entropy(x, target, *filled.values())[0],
        [logits],
        what,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 16), (7, 65), (40, 333)], ids=str)
def test_parity(isa, dtype, reduction, shape):
    check(random(*shape, dtype=dtype, scale=3.0), targets(*shape), what=f"{shape}", reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary(isa, dtype):
    check(random(20, 50257, dtype=dtype), targets(20, 50257), what="50257 classes")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets(isa, reduction):
    logits, target = random(12, 30), targets(12, 30, ignored=(0, 5, 11))
    check(logits, target, reduction=reduction)
    check(logits, targets(12, 30), reduction=reduction, ignore_index=int(targets(12, 30)[3]))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(isa, smoothing):
    check(random(12, 30), targets(12, 30, ignored=(2,)), label_smoothing=smoothing)


def test_all_ignored_is_nan_as_in_torch(isa):
    logits, target = random(3, 5).requires_grad_(), torch.full((3,), -100)
    loss = ops.cross_entropy(logits, target)
    assert loss.isnan()
    assert ops.cross_entropy(logits, target, reduction="sum") == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(isa, dtype):
    inf, nan = float("inf"), float("nan")
    rows = [
        [0.0, inf, 1.0],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [nan, 0.0, 1.0],
        [1e4, 0.0, -1e4],
        [300.0, 300.0, 300.0],
    ]
    x, target = torch.tensor(rows, dtype=dtype), torch.tensor([0, 0, 1, 1, 2, 0])
    ours = ops.cross_entropy(x, target, reduction="none")
    theirs = F.cross_entropy(x.float(), target, reduction="none")
    assert_parity(ours, theirs, F.cross_entropy(x.double(), target, reduction="none"), "special values")


def test_shapes():
    x = random(5)
    torch.testing.assert_close(ops.cross_entropy(x, torch.tensor(2)), F.cross_entropy(x, torch.tensor(2)))
    assert ops.cross_entropy(x, torch.tensor(2), reduction="none").shape == ()
    assert ops.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), reduction="sum") == 0
    check(random(30, 8).t(), targets(8, 30), what="transposed")


def test_the_loss_of_half_logits_is_float32():
    assert ops.cross_entropy(random(4, 9, dtype=torch.bfloat16), targets(4, 9)).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(reduction, smoothing):
    x, target = random(4, 7, dtype=torch.float64).requires_grad_(), targets(4, 7, ignored=(1,))
    function = partial(ops.cross_entropy, target=target, reduction=reduction, label_smoothing=smoothing)
    assert torch.autograd.gradcheck(function, (x,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(dtype, reduction):
    op = torch.ops.fastgpt.cross_entropy.default
    x, target = random(6, 10, dtype=dtype), targets(6, 10)
    opcheck(op, (x.clone().requires_grad_(), target, -100, reduction, 0.1))
    loss, lse = op(x, target, -100, reduction, 0.1)
    opcheck(torch.ops.fastgpt.cross_entropy_backward.default, (loss, x, target, lse, -100, reduction, 0.1))


def test_compile():
    x, target = random(6, 10).requires_grad_(), targets(6, 10)
    function = lambda v: ops.cross_entropy(v * 2, target)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(function(x), x))


def test_bad_input():
    x = random(3, 4)
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="expected 0 to 3 or ignore_index"):
            ops.cross_entropy(x, torch.tensor([0, wrong, 1]))
        with pytest.raises(IndexError, match="expected 0 to 3 or ignore_index"):
            ops.cross_entropy(x.double(), torch.tensor([0, wrong, 1]))
    with pytest.raises(TypeError, match="int32"):
        ops.cross_entropy(x, torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected \(N, C\)"):
        ops.cross_entropy(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="reduction"):
        ops.cross_entropy(x, torch.tensor([0, 1, 2]), reduction="max")
    with pytest.raises(ValueError, match="label_smoothing"):
        ops.cross_entropy(x, torch.tensor([0, 1, 2]), label_smoothing=2.0)
