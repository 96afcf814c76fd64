"""rms_norm: every engine against the formula."""

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def check(x, weight=None, eps=1e-5, what=""):
    def named(*leaves):
        return leaves[0], leaves[1] if weight is not None else None

    def ours(*leaves):
        v, w = named(*leaves)
        return ops.rms_norm(v, v.shape[-1:], w, eps)

    def torchs(*leaves):
        v, w = named(*leaves)
        w = None if w is None else w.to(v.dtype)  # torch has no fused form of two dtypes
        return F.rms_norm(v, v.shape[-1:], w, eps)

    inputs = [x] if weight is None else [x, weight]
    check_op(ours, torchs, lambda *leaves: reference.rms_norm(*named(*leaves), eps)[0], inputs, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5), (4, 16), (2, 9, 33), (70, 128), (3, 768), (1, 40001)], ids=str)
def test_parity(isa, dtype, shape):
    check(random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1), what=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weight(isa, dtype):
    check(random(6, 50, dtype=dtype), what="plain")


def test_half_input_with_float_weight(isa):
    check(random(30, 64, dtype=torch.bfloat16), random(64, seed=1), what="bf16 with fp32 weight")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_default_eps_is_torchs(dtype):
    x = random(4, 24, dtype=dtype, scale=1e-4)
    torch.testing.assert_close(ops.rms_norm(x, (24,)), F.rms_norm(x, (24,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(isa, dtype):
    x = random(5, 33, dtype=dtype)
    x[0, 3], x[1, 4], x[2, 5], x[3] = float("nan"), float("inf"), -float("inf"), 0.0
    exact = reference.rms_norm(x.double(), None, 1e-6)[0]
    assert_parity(ops.rms_norm(x, (33,), eps=1e-6), F.rms_norm(x, (33,), eps=1e-6), exact, "special values")


def test_several_dimensions(isa):
    x, w = random(5, 4, 6), random(4, 6, seed=1)
    torchs = lambda x, w: F.rms_norm(x, (4, 6), w, 1e-5)  # noqa: E731
    check_op(lambda x, w: ops.rms_norm(x, (4, 6), w, 1e-5), torchs, torchs, [x, w])


def test_strided_and_empty(isa):
    check(random(40, 30).t(), random(40, seed=1), what="transposed")
    w = random(7).requires_grad_()
    y = ops.rms_norm(torch.empty(0, 7), (7,), w)
    y.sum().backward()
    assert y.shape == (0, 7)
    assert w.grad is not None
    assert (w.grad == 0).all()


def test_same_bits_for_any_number_of_threads(isa):
    x, w = random(999, 96), random(96, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            y = ops.rms_norm(leaves[0], (96,), leaves[1])
            results.append([y, *torch.autograd.grad(y, leaves, random(999, 96, seed=3))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck():
    x, w = random(3, 4, 5, dtype=torch.float64).requires_grad_(), random(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, (5,), w), (x, w))
    assert torch.autograd.gradcheck(lambda x: ops.rms_norm(x, (5,)), (x,))


def test_only_the_gradients_asked_for():
    x, w = random(4, 8), random(8, seed=1).requires_grad_()
    ops.rms_norm(x, (8,), w).sum().backward()
    assert x.grad is None
    assert w.grad is not None
    leaf = x.clone().requires_grad_()
    ops.rms_norm(leaf, (8,), w.detach()).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(dtype):
    op = torch.ops.fastgpt.rms_norm.default
    x, w = random(3, 4, 9, dtype=dtype), random(9, dtype=dtype)
    opcheck(op, (x.clone().requires_grad_(), w.clone().requires_grad_(), 1e-5))
    opcheck(op, (x, None, 1e-5))
    _, rstd = op(x, w, 1e-5)
    for needs in (True, False):
        opcheck(torch.ops.fastgpt.rms_norm_backward.default, (x, x, w, rstd, needs))


def test_compile():
    x, w = random(5, 24).requires_grad_(), random(24, seed=1).requires_grad_()
    function = lambda x, w: ops.rms_norm(x * 2, (24,), w).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, w), function(x, w))
    mine = torch.autograd.grad(compiled(x, w).sum(), (x, w))
    torch.testing.assert_close(mine, torch.autograd.grad(function(x, w).sum(), (x, w)))


def test_autocast_keeps_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rms_norm(random(2, 4), (4,)).dtype == torch.float32
        assert ops.rms_norm(random(2, 4, dtype=torch.bfloat16), (4,)).dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(ValueError, match=r"rms_norm: normalized_shape is \(3,\)"):
        ops.rms_norm(torch.ones(3, 4), (3,))
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(torch.ones(3, 4), (4,), torch.ones(3))
    with pytest.raises(TypeError, match="int32"):
        ops.rms_norm(torch.ones(3, 4, dtype=torch.int32), (4,))
