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
    filled = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0} | options
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


def torch_with_z_loss(x, target, z_loss):
    x = x.float() if x.dtype == torch.bfloat16 else x
    counted = target != -100
    return F.cross_entropy(x, target) + z_loss * (torch.logsumexp(x, -1)[counted] ** 2).sum() / counted.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_z_loss(isa, dtype):
    for rows, classes, z_loss in ((7, 65, 1e-4), (12, 333, 0.5)):
        target = targets(rows, classes, ignored=(1,))
        check_op(
            lambda x: ops.cross_entropy(x, target, z_loss=z_loss),  # noqa: B023
            lambda x: torch_with_z_loss(x, target, z_loss),  # noqa: B023
            lambda x: torch_with_z_loss(x, target, z_loss),  # noqa: B023
            [random(rows, classes, dtype=dtype, scale=3.0)],
            f"{z_loss}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 2), (7, 65), (40, 333)], ids=str)
def test_the_gradient_in_place_of_the_logits(isa, dtype, reduction, shape):
    logits, target = random(*shape, dtype=dtype, scale=3.0), targets(*shape)
    if shape[0] > 1:
        target[0] = -100
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-3}
    # A gradient of bf16 logits is rounded before it is scaled; half of it rounds no more, which is what the rule allows for.
    for grad in (1.0, 0.3 if dtype == torch.float32 else 0.5):
        wide = logits.double().requires_grad_()
        exact_loss = ops.cross_entropy(wide, target, **options)
        consumed = logits.clone().requires_grad_() * 1
        loss = ops.cross_entropy(consumed, target, inplace_backward=True, **options)
        assert_parity(loss, ops.cross_entropy(logits, target, **options), exact_loss, "in place")
        factor = torch.full_like(loss, grad)
        (mine,) = torch.autograd.grad(loss, consumed, factor)
        (exact,) = torch.autograd.grad(exact_loss, wide, factor.double())
        plain = logits.clone().requires_grad_()
        (usual,) = torch.autograd.grad(ops.cross_entropy(plain, target, **options), plain, factor)
        assert_parity(mine, usual, exact, f"gradient times {grad}")
        assert mine.data_ptr() == consumed.data_ptr()


def test_in_place_goes_on_to_what_made_the_logits():
    x, w, target = random(12, 8), random(30, 8, seed=1), targets(12, 30)
    grads = []
    for inplace in (False, True):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        ops.cross_entropy(F.linear(*leaves), target, inplace_backward=inplace).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])


def test_in_place_raises_where_it_would_be_wrong():
    x, target = random(12, 30).requires_grad_(), targets(12, 30)
    loss = ops.cross_entropy(torch.tanh(x), target, inplace_backward=True)  # tanh keeps its result for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = ops.cross_entropy(x * 1, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_changes_nothing_where_no_gradient_is_asked_for():
    logits, target = random(12, 30), targets(12, 30)
    kept = logits.clone()
    ops.cross_entropy(logits, target, inplace_backward=True)
    with torch.no_grad():
        ops.cross_entropy(logits.requires_grad_(), target, inplace_backward=True)
    assert torch.equal(logits, kept)
    strided = random(30, 12).requires_grad_()
    before = strided.detach().clone()
    ops.cross_entropy(strided.t(), target, inplace_backward=True).backward()
    assert torch.equal(strided, before)


def test_same_bits_for_any_number_of_threads(isa):
    logits, target = random(300, 77).requires_grad_(), targets(300, 77)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            loss = ops.cross_entropy(logits, target)
            consumed = logits * 1
            replaced = ops.cross_entropy(consumed, target, inplace_backward=True)
            results.append([loss, torch.autograd.grad(loss, logits)[0], replaced, consumed.detach()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
    assert torch.autograd.gradcheck(partial(function, z_loss=0.1), (x,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(dtype, reduction):
    op = torch.ops.fastgpt.cross_entropy.default
    x, target = random(6, 10, dtype=dtype), targets(6, 10)
    opcheck(op, (x.clone().requires_grad_(), target, -100, reduction, 0.1))
    opcheck(op, (x.clone().requires_grad_(), target, -100, reduction, 0.0, 1e-3))
    opcheck(torch.ops.fastgpt.cross_entropy_inplace.default, (x.clone(), target, -100, reduction, 0.1, 1e-3))
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
    with pytest.raises(ValueError, match="z_loss"):
        ops.cross_entropy(x, torch.tensor([0, 1, 2]), z_loss=-1.0)
