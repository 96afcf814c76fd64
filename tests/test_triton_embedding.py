"""The Triton kernels of embedding: the formula's rows and sums, in a fixed order."""

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")


def ids_of(rows, *shape, dtype=torch.int64):
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def check(rows, cols, ids, dtype=torch.float32, padding_idx=None):
    check_op(
        lambda w: ops.embedding(ids.to(w.device), w, padding_idx),
        lambda w: F.embedding(ids.to(w.device), w, padding_idx),
        # the formula's gradient comes from torch in float64
        lambda w: F.embedding(ids, w, padding_idx),
        [random(rows, cols, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("rows", "cols", "shape"), [(1, 1, (1,)), (11, 33, (2, 9)), (5, 1030, (40,))], ids=str)
def test_parity(rows, cols, shape, wide, dtype):
    check(rows, cols, ids_of(rows, *shape, dtype=wide), dtype)


def test_padding_and_no_ids():
    check(6, 8, ids_of(6, 30), padding_idx=2)
    assert ops.embedding(torch.empty(0, 3, dtype=torch.int64, device=DEVICE), random(4, 5).to(DEVICE)).shape == (
        0,
        3,
        5,
    )


def test_into_a_gradient_that_is_there():
    weight, ids = random(9, 20).to(DEVICE).requires_grad_(), ids_of(9, 25).to(DEVICE)
    before, grad = random(9, 20, seed=1).to(DEVICE), random(25, 20, seed=2).to(DEVICE)
    weight.grad = before.clone()
    ops.embedding(ids, weight, accumulate_grad=True).backward(grad)
    wanted = before.cpu().double()
    reference.embedding_accumulate(wanted, grad.cpu().double(), ids.cpu(), -1)
    torch.testing.assert_close(weight.grad.cpu(), wanted.float())


def test_ids_outside_give_nan_and_no_gradient():
    weight = random(4, 6).to(DEVICE).requires_grad_()
    y = ops.embedding(torch.tensor([1, 4, -1, 3], device=DEVICE), weight)
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    y.nan_to_num().sum().backward()
    assert weight.grad.sum(1).tolist() == [0.0, 6.0, 0.0, 6.0]


def test_opcheck():
    weight, ids = random(7, 10).to(DEVICE), ids_of(7, 3, 4).to(DEVICE)
    grad = random(3, 4, 10, seed=1).to(DEVICE)
    opcheck(torch.ops.fastgpt.embedding.default, (ids, weight, -1, False))
    opcheck(torch.ops.fastgpt.embedding_backward.default, (grad, ids, 7, 2))
    opcheck(torch.ops.fastgpt.embedding_accumulate_backward.default, (weight, grad, ids, -1))


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parity(self, dtype):
        check(50257, 768, ids_of(50257, 8, 1025), dtype)

    def test_same_bits_every_time(self):
        weight, ids = random(300, 97).to(DEVICE).requires_grad_(), ids_of(300, 8192).to(DEVICE)
        grad = random(8192, 97, seed=1).to(DEVICE)
        first = torch.autograd.grad(ops.embedding(ids, weight), weight, grad)[0]
        for _ in range(1000):
            assert torch.equal(first, torch.autograd.grad(ops.embedding(ids, weight), weight, grad)[0])
