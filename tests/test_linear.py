"""linear, its fused activation and residual, and linear_cross_entropy: every engine against the formula."""

import sys

import pytest
import torch
import torch.nn.functional as F
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops.reference.activation import by_name
from fastgpt.ops.reference.linear import project

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def inputs(rows, width, out, dtype=torch.float32):
    return [
        random(rows, width, dtype=dtype),
        random(out, width, dtype=dtype, seed=1, scale=width**-0.5),
        random(out, dtype=dtype, seed=2),
    ]


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


# Rows: few (no packing) and many; sizes on both sides of a vector, a tile, a panel, a block, and of what a sum is split into.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 65, 33), (8, 31, 7), (9, 16, 48), (97, 113, 50), (200, 257, 300), (1100, 40, 20), (30, 1030, 9)],
    ids=str,
)
def test_parity(isa, dtype, shape):
    check_op(ops.linear, F.linear, project, inputs(*shape, dtype), f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (3, 65, 33), (1, 300, 200), (8, 31, 7), (9, 16, 48), (97, 113, 50), (1100, 40, 20)], ids=str
)
def test_a_transposed_weight_is_read_where_it_is(isa, dtype, shape, monkeypatch):
    x, w, b = inputs(*shape, dtype)
    check_op(
        lambda x, w, b: ops.linear(x, w.t(), b),
        lambda x, w, b: torch.addmm(b, x, w),
        lambda x, w, b: project(x, w.t(), b),
        [x, w.t().contiguous(), b],
        f"{shape}",
    )
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("copied")
    )
    leaf = w.t().clone(memory_format=torch.contiguous_format).requires_grad_()
    grad = torch.ones(shape[0], shape[2], dtype=dtype)
    ops.linear(x, leaf.t(), b).backward(grad)
    assert leaf.grad.is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("rows", [5, 70])
def test_activation_and_residual(isa, activation, rows):
    function = ACTIVATIONS[activation]
    check_op(
        lambda x, w, b, r: ops.linear(x, w, b, activation=activation, residual=r),
        lambda x, w, b, r: function(F.linear(x, w, b)) + r,
        lambda x, w, b, r: by_name(activation or "")(project(x, w, b)) + r,
        [*inputs(rows, 40, 50), random(rows, 50, seed=3)],
        f"{activation}",
    )


def test_half_storage_with_an_activation(isa):
    x, w, b = inputs(70, 40, 50, torch.bfloat16)
    check_op(
        lambda x, w, b: ops.linear(x, w, b, activation="gelu"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        [x, w, b],
    )


def test_strides_batches_and_empty(isa):
    check_op(
        ops.linear,
        F.linear,
        F.linear,
        [random(40, 30).t(), random(50, 40, seed=1).t().contiguous().t(), random(50, seed=2)],
    )
    x, w, b = inputs(60, 24, 10)
    torch.testing.assert_close(ops.linear(x.view(3, 4, 5, 24), w, b).view(60, 10), ops.linear(x, w, b), rtol=0, atol=0)
    w.requires_grad_()
    y = ops.linear(torch.empty(0, 24), w)
    y.sum().backward()
    assert y.shape == (0, 10)
    assert w.grad is not None
    assert (w.grad == 0).all()


def test_nan_and_infinity_come_through(isa):
    x, w, _ = inputs(20, 33, 17)
    x[3, 4], x[5, 6] = float("nan"), float("inf")
    assert_parity(ops.linear(x, w), F.linear(x, w), F.linear(x.double(), w.double()), "special values")


def test_medium_precision_is_bf16_products_with_fp32_sums(isa, medium):
    x, w, b = inputs(300, 384, 200)
    exact = F.linear(x.double(), w.double(), b.double())
    halves = F.linear(x.bfloat16().double(), w.bfloat16().double(), b.double())
    y = ops.linear(x, w, b)
    error = (y - exact).norm() / exact.norm()
    assert error < 4e-3
    if isa == "avx512" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert (y - halves).norm() / halves.norm() < 1e-6  # the inputs are rounded, nothing else


def test_autocast_takes_the_weights_as_they_are(isa):
    x, w, b = inputs(50, 64, 80)
    exact = F.linear(x.double(), w.double(), b.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = ops.linear(x, w, b), F.linear(x, w, b)
    assert_parity(ours, torchs, exact, "autocast")
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear(*leaves).float().square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_same_bits_for_any_number_of_threads(isa):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs(301, 96, 130)]
            y = ops.linear(*leaves, activation="gelu")
            target = torch.arange(301) % 130
            loss = ops.linear_cross_entropy(leaves[0], leaves[1], target)
            results.append(
                [y, *torch.autograd.grad(y, leaves, random(301, 130, seed=3)), *torch.autograd.grad(loss, leaves[:2])]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck():
    x, w, b = (t.requires_grad_() for t in inputs(4, 5, 6, torch.float64))
    r = random(4, 6, dtype=torch.float64, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b, r: ops.linear(x, w, b, activation="silu", residual=r), (x, w, b, r))
    target = torch.tensor([1, 5, -100, 0])
    assert torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, target, label_smoothing=0.1), (x, w))


def test_only_the_gradients_asked_for():
    x, w, b = inputs(20, 8, 9)
    b.requires_grad_()
    ops.linear(x, w, b).sum().backward()
    assert x.grad is None
    assert w.grad is None
    torch.testing.assert_close(b.grad, torch.full((9,), 20.0))


# ---- linear_cross_entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 5), (37, 33, 65), (300, 16, 1000)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}], ids=str)
def test_loss_parity(isa, dtype, shape, options, monkeypatch):
    module = sys.modules[ops.linear_cross_entropy.__module__]
    monkeypatch.setattr(module, "_LEAST_ROWS", 16)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)  # chunks of 16 rows
    rows, width, classes = shape
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(5))
    target[::7] = -100 if rows > 1 else target[::7]
    x, w, _ = inputs(rows, width, classes, dtype)

    def torchs(x, w):
        return F.cross_entropy(
            F.linear(x, w).float() if x.dtype == torch.bfloat16 else F.linear(x, w), target, **options
        )

    check_op(lambda x, w: ops.linear_cross_entropy(x, w, target, **options), torchs, torchs, [x, w], f"{shape}")


def test_loss_without_rows_or_targets(isa):
    w = random(7, 4).requires_grad_()
    ops.linear_cross_entropy(torch.empty(0, 4), w, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert torch.equal(w.grad, torch.zeros(7, 4))
    loss = ops.linear_cross_entropy(random(3, 4), w, torch.full((3,), -100))
    assert torch.isnan(loss)  # as torch: the mean over nothing


def test_the_losses_gradient_scales(isa):
    x, w, _ = inputs(30, 12, 9)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    target = torch.arange(30) % 9
    plain = torch.autograd.grad(ops.linear_cross_entropy(x, w, target), leaves)
    scaled = torch.autograd.grad(ops.linear_cross_entropy(x, w, target) * 0.25, leaves)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a * 0.25, b)


def test_logits_are_never_whole_in_memory():
    rows, width, classes = 1024, 8, 40000
    x, w, _ = inputs(rows, width, classes)
    w.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.linear_cross_entropy(x, w, torch.arange(rows)).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < rows * classes * 4 / 2


# ---- both


def test_takes_turns_with_torchs_own_products_in_bf16(isa):
    """Where the chip multiplies tiles, both sides set their shapes up on the same threads."""
    x, weight, _ = inputs(96, 256, 128, dtype=torch.bfloat16)
    q = random(2, 4, 80, 32, dtype=torch.bfloat16)
    sides = {
        "ours": lambda: (ops.linear(x, weight), ops.attention(q, q, q, is_causal=True)),
        "torch": lambda: (F.linear(x, weight), F.scaled_dot_product_attention(q, q, q, is_causal=True)),
    }
    first = {name: side() for name, side in sides.items()}
    for _ in range(3):
        for name, side in sides.items():
            for again, expected in zip(side(), first[name], strict=True):
                assert torch.equal(again, expected), name


def test_opcheck():
    x, w, b = inputs(20, 8, 12)
    linear, loss = torch.ops.fastgpt.linear.default, torch.ops.fastgpt.linear_cross_entropy.default
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    opcheck(linear, (*leaves, None, "gelu", torch.float32, True))
    opcheck(linear, (x, w, None, random(20, 12), "", torch.float32, False))
    opcheck(torch.ops.fastgpt.linear_backward.default, (random(20, 12), x, w, True, False, True))
    transposed = w.detach().t().contiguous().t()
    opcheck(torch.ops.fastgpt.linear_backward.default, (random(20, 12), x, transposed, True, True, True))
    opcheck(loss, (*leaves[:2], torch.arange(20) % 12, -100, "mean", 0.0, torch.float32, True))


def test_compile():
    x, w, b = (t.requires_grad_() for t in inputs(20, 24, 16))
    target = torch.arange(20) % 16

    def function(x, w, b):
        return ops.linear(x * 2, w, b, activation="gelu").square().sum() + ops.linear_cross_entropy(x, w, target)

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x, w, b), function(x, w, b))
    mine = torch.autograd.grad(compiled(x, w, b), (x, w, b))
    torch.testing.assert_close(mine, torch.autograd.grad(function(x, w, b), (x, w, b)))


def test_bad_input():
    x, w, b = inputs(4, 5, 6)
    with pytest.raises(ValueError, match="weight"):
        ops.linear(x, w.t())
    with pytest.raises(ValueError, match="bias has shape"):
        ops.linear(x, w, b[:3])
    with pytest.raises(ValueError, match="residual has shape"):
        ops.linear(x, w, residual=x)
    with pytest.raises(ValueError, match="activation is 'gleu'"):
        ops.linear(x, w, activation="gleu")
    with pytest.raises(TypeError, match="int64"):
        ops.linear(torch.ones(4, 5, dtype=torch.int64), w)
    target = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(IndexError, match="row 2"):
        ops.linear_cross_entropy(x, w, torch.tensor([0, 1, 6, 2]))
    with pytest.raises(ValueError, match="reduction"):
        ops.linear_cross_entropy(x, w, target, reduction="none")
    with pytest.raises(TypeError, match="int32"):
        ops.linear_cross_entropy(x, w, target.int())
    with pytest.raises(ValueError, match="shapes"):
        ops.linear_cross_entropy(x, w, target[:2])
