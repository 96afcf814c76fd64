"""The chunked loss over Triton's cross-entropy kernels against the formula; and the gradient in the place of the logits."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, check_op, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.kernels import linear_cross_entropy as kernels
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

shared = importlib.import_module("fastgpt.ops.linear_cross_entropy")


def targets(rows, classes, ignored=()):
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(3))
    target[list(ignored)] = -100
    return target


def check(rows, width, classes, ignored=(), dtype=torch.float32, reduction="mean", smoothing=0.0):
    target = targets(rows, classes, ignored)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    check_op(
        lambda x, w: ops.linear_cross_entropy(x, w, target.to(x.device), **options),
        lambda x, w: F.cross_entropy(F.linear(x, w).float(), target.to(x.device), **options),
        lambda x, w: reference.linear_cross_entropy(x, w, target, -100, reduction, smoothing, torch.float64, False)[0],
        [random(rows, width, dtype=dtype), random(classes, width, dtype=dtype, seed=1, scale=0.3)],
    )


@pytest.fixture
def short_chunks(monkeypatch):
    """Eight rows a chunk."""
    monkeypatch.setattr(shared, "_DEVICE_MOST_ROWS", 8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 3, 2), (7, 16, 65), (20, 33, 97)], ids=str)
def test_parity(shape, reduction):
    check(*shape, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks(short_chunks, dtype):
    assert kernels.device_chunk_rows(21, 97) == 8
    check(21, 24, 97, ignored=(0, 9, 20), dtype=dtype, smoothing=0.1)


def test_chunks_of_real_sizes():
    """8k to 16k rows of GPT-2's vocabulary; about even, multiples of 8, and no more numbers than DEVICE_CHUNK."""
    assert 8192 <= kernels.device_chunk_rows(65536, 50304) <= 16384
    assert kernels.device_chunk_rows(65536, 65) == 16384
    assert kernels.device_chunk_rows(4096, 50304) == 4096
    for rows, classes in ((1, 50304), (16385, 50304), (65536, 128_256), (100_000, 262_144)):
        chunk = kernels.device_chunk_rows(rows, classes)
        chunks = -(-rows // chunk)
        assert chunk % 8 == 0
        assert chunk * classes <= shared.DEVICE_CHUNK + 8 * classes
        assert chunk * chunks - rows < 8 * chunks


def test_no_rows_and_all_ignored(short_chunks):
    x, w = random(9, 4).to(DEVICE).requires_grad_(), random(5, 4, seed=1).to(DEVICE).requires_grad_()
    none = targets(9, 5, range(9)).to(DEVICE)
    loss = ops.linear_cross_entropy(x, w, none)
    loss.backward()
    assert loss.isnan()
    assert ops.linear_cross_entropy(x, w, none, reduction="sum") == 0
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()
    empty = ops.linear_cross_entropy(x[:0], w, none[:0], reduction="sum")
    assert empty == 0


def test_autocast_and_opcheck():
    x, w, target = random(6, 8).to(DEVICE), random(11, 8, seed=1).to(DEVICE), targets(6, 11).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        half = ops.linear_cross_entropy(x, w, target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, F.cross_entropy(x @ w.t(), target), rtol=2e-2, atol=2e-2)
    for keeps in (True, False):
        args = (x, w, target, -100, "mean", 0.1, torch.float32, keeps)
        opcheck(torch.ops.fastgpt.linear_cross_entropy.default, args)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_gradient_in_place_of_the_logits(reduction):
    logits, target = random(7, 65).to(DEVICE), targets(7, 65, (2,)).to(DEVICE)
    wanted = logits.clone().requires_grad_()
    F.cross_entropy(wanted, target, reduction=reduction).sum().backward()
    op = torch.ops.fastgpt.cross_entropy_inplace.default
    loss = op(logits, target, -100, reduction, 0.0, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(wanted, target, reduction=reduction))
    torch.testing.assert_close(logits, wanted.grad)


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_parity(self, dtype):
        check(4096, 768, 50304, ignored=(5,), dtype=dtype)

    def test_memory_is_a_chunks(self):
        rows, width, classes = 32768, 768, 50304
        x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        w = torch.randn(classes, width, device=DEVICE, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ops.linear_cross_entropy(x, w, targets(rows, classes).to(DEVICE)).backward()
        assert torch.cuda.max_memory_allocated() - before < 4 * shared.DEVICE_CHUNK + 8 * w.nbytes
