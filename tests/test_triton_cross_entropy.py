"""The Triton kernels of cross_entropy against the formula."""

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")


def targets(rows, classes, ignored=(), seed=7):
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    for i in ignored:
        target[i] = -100
    return target


def check(logits, target, **options):
    filled = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0} | options
    z = options.get("z_loss", 0.0)
    theirs = {name: value for name, value in options.items() if name != "z_loss"}

    def torchs(x):
        # torch rounds a half-type loss to its dtype; ours stays in float32, so torch's side is compared in float32 too
        x, labels = x.float(), target.to(x.device)
        loss = F.cross_entropy(x, labels, **theirs)
        squares = torch.where(labels != filled["ignore_index"], torch.logsumexp(x, -1).square(), 0.0)
        return loss + z * squares.sum() if z else loss

    check_op(
        lambda x: ops.cross_entropy(x, target.to(x.device), **options),
        torchs,
        lambda x: reference.cross_entropy(x, target, *filled.values())[0],
        [logits],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 65), (40, 333), (3, 4097)], ids=str)
def test_parity(dtype, reduction, shape):
    check(random(*shape, dtype=dtype, scale=3.0), targets(*shape), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary(dtype):
    check(random(3, 50257, dtype=dtype), targets(3, 50257))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_targets(reduction):
    logits, target = random(12, 30), targets(12, 30, ignored=(0, 5, 11))
    check(logits, target, reduction=reduction)
    check(logits, targets(12, 30), reduction=reduction, ignore_index=int(targets(12, 30)[3]))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("classes", [30, 5000])
def test_label_smoothing(smoothing, classes):
    check(random(5, classes), targets(5, classes, ignored=(2,)), label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [30, 5000])
def test_z_loss(smoothing, classes):
    check(
        random(5, classes), targets(5, classes, ignored=(2,)), reduction="sum", label_smoothing=smoothing, z_loss=0.01
    )


def test_ignored_rows_hide_nan():
    logits, target = random(4, 9), targets(4, 9, ignored=(1,))
    logits[1] = float("nan")
    leaf = logits.to(DEVICE).requires_grad_()
    loss = ops.cross_entropy(leaf, target.to(DEVICE), label_smoothing=0.1)
    loss.backward()
    keep = [0, 2, 3]
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(logits[keep], target[keep], label_smoothing=0.1))
    assert (leaf.grad[1] == 0).all()
    assert leaf.grad.isfinite().all()


def test_all_ignored_is_nan_as_in_torch():
    logits, target = random(3, 5).to(DEVICE).requires_grad_(), torch.full((3,), -100, device=DEVICE)
    loss = ops.cross_entropy(logits, target)
    loss.backward()
    assert loss.isnan()
    assert (logits.grad == 0).all()
    assert ops.cross_entropy(logits, target, reduction="sum") == 0


@pytest.mark.parametrize("wrong", [9, -1, 2**40])
def test_a_target_outside_the_classes_is_nan_and_stays_in_bounds(wrong):
    logits, target = random(4, 9).to(DEVICE).requires_grad_(), targets(4, 9)
    target[2] = wrong
    losses = ops.cross_entropy(logits, target.to(DEVICE), reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, False, True, False]
    assert logits.grad.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("repeats", [1, 2000])
def test_special_values(dtype, repeats):
    inf, nan = float("inf"), float("nan")
    rows = [
        [0.0, inf, 1.0],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [nan, 0.0, 1.0],
        [1e4, 0.0, -1e4],
        [300.0, 300.0, 300.0],
    ]
    x, target = torch.tensor(rows, dtype=dtype).repeat(1, repeats), torch.tensor([0, 0, 1, 1, 2, 0])
    ours = there(lambda v: ops.cross_entropy(v, target.to(v.device), reduction="none"))(x)
    theirs = F.cross_entropy(x.float(), target, reduction="none")
    assert_parity(ours, theirs, F.cross_entropy(x.double(), target, reduction="none"), "special values")


def test_a_row_that_starts_with_a_block_of_minus_infinity():
    x = random(2, 9000)
    x[:, :8500] = -torch.inf
    check(x, torch.tensor([8600, 8999]), reduction="sum")


def test_shapes():
    x = random(5)
    ours = ops.cross_entropy(x.to(DEVICE), torch.tensor(2, device=DEVICE)).cpu()
    torch.testing.assert_close(ours, F.cross_entropy(x, torch.tensor(2)))
    empty = ops.cross_entropy(torch.empty(0, 5, device=DEVICE), targets(0, 5).to(DEVICE), reduction="sum")
    assert empty == 0
    check(random(30, 8).t(), targets(8, 30))


def test_a_view_of_a_padded_vocabulary_is_read_in_place():
    padded, target = random(6, 40), targets(6, 33)
    ours = ops.cross_entropy(padded.to(DEVICE)[:, 3:36], target.to(DEVICE)).cpu()
    torch.testing.assert_close(ours, F.cross_entropy(padded[:, 3:36], target))


def test_opcheck():
    op = torch.ops.fastgpt.cross_entropy.default
    x, target = random(6, 10).to(DEVICE), targets(6, 10).to(DEVICE)
    for reduction in ("mean", "none"):
        opcheck(op, (x.clone().requires_grad_(), target, -100, reduction, 0.1))
        loss, lse = op(x, target, -100, reduction, 0.1)
        opcheck(torch.ops.fastgpt.cross_entropy_backward.default, (loss, x, target, lse, -100, reduction, 0.1))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(16384, 65), (2048, 50304), (1024, 128256)], ids=str)
    def test_parity(self, dtype, shape):
        check(random(*shape, dtype=dtype), targets(*shape, ignored=(3,)), label_smoothing=0.1)

    def test_more_than_two_to_the_31_logits(self):
        classes = 50304
        rows = 2**31 // classes + 2
        logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        target = torch.full((rows,), classes - 1, device=DEVICE)
        ops.cross_entropy(logits, target, reduction="sum").backward()
        torch.testing.assert_close(logits.grad[-1, -1].item(), -1.0, atol=1e-2, rtol=0)
        torch.testing.assert_close(logits.grad[-1, :-1].float().sum().item(), 1.0, atol=1e-2, rtol=0)
