"""rope and rope_tables: every engine against the formula, the formula against complex numbers and another library's form."""

import pytest
import torch
from parity import DTYPES, assert_parity, check_op, random
from torch.library import opcheck

from fastgpt import ops
from fastgpt.ops import reference


def plain_rope(x, cos, sin, interleaved):
    """The form that Hugging Face's models have, in the input's dtype; interleaved: by a permutation around it."""
    D, R = x.shape[-1], 2 * cos.shape[-1]
    order = torch.arange(R).view(-1, 2).t().flatten() if interleaved else torch.arange(R)
    turned = x[..., order]
    half = torch.cat([-turned[..., R // 2 :], turned[..., : R // 2]], -1)
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    turned = (turned * cos + half * sin)[..., torch.argsort(order)]
    return torch.cat([turned, x[..., R:D]], -1)


def check(x, rotary, interleaved, what=""):
    cos, sin = ops.rope_tables(rotary, x.shape[2], start=3)
    check_op(
        lambda x: ops.rope(x, cos, sin, interleaved=interleaved),
        lambda x: plain_rope(x, cos, sin, interleaved),
        lambda x: reference.rope(x, cos, sin, interleaved, False),
        [x],
        what,
    )


both_layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rotary"),
    [((1, 1, 1, 2), 2), ((2, 3, 5, 8), 8), ((2, 2, 7, 64), 64), ((1, 3, 40, 80), 80), ((2, 3, 5, 33), 20), ((1, 2, 3, 9), 0)],
    ids=str,
)  # fmt: skip
def test_parity(isa, interleaved, dtype, shape, rotary):
    check(random(*shape, dtype=dtype), rotary, interleaved, f"{shape}")


@both_layouts
def test_strides(isa, interleaved):
    qkv = random(2, 11, 5, 3, 16)
    check(qkv[:, :, 1].transpose(1, 2), 16, interleaved, "a slice of a projection")
    check(random(2, 3, 16, 11).transpose(2, 3), 16, interleaved, "D not contiguous")
    cos, sin = ops.rope_tables(16, 30)
    x = random(2, 3, 4, 16)
    y = ops.rope(x, cos[5:9], sin[5:9], interleaved=interleaved)
    far = ops.rope(torch.cat([x[:, :, :1].expand(2, 3, 5, 16), x], 2), cos[:9], sin[:9], interleaved=interleaved)
    assert torch.equal(y, far[:, :, 5:])
    assert ops.rope(torch.empty(0, 2, 4, 16), cos[:4], sin[:4]).shape == (0, 2, 4, 16)


@both_layouts
def test_the_formula_is_a_product_of_complex_numbers(interleaved):
    x = random(2, 3, 7, 10, dtype=torch.float64)
    positions = torch.arange(7, dtype=torch.float64)
    angles = positions[:, None] * 50.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :5], x[..., 5:])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    parts = turned.real, turned.imag
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    cos, sin = ops.rope_tables(10, 7, 50.0)
    torch.testing.assert_close(ops.rope(x, cos, sin, interleaved=interleaved), expected, rtol=0, atol=1e-6)


@both_layouts
def test_products_depend_on_the_distance_only(isa, interleaved):
    q, k = random(1, 1, 1, 32), random(1, 1, 1, 32, seed=1)

    def score(i, j):
        turned = [ops.rope(x, *ops.rope_tables(32, 1, start=p), interleaved=interleaved) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 10), score(103, 110), rtol=1e-4, atol=1e-4)
    assert abs(score(3, 10) - score(3, 11)) > 1e-3


@both_layouts
def test_special_values(isa, interleaved):
    x = random(1, 1, 3, 20)
    x[0, 0, 0, 1], x[0, 0, 1, 2], x[0, 0, 2, 3] = float("nan"), float("inf"), -float("inf")
    cos, sin = ops.rope_tables(20, 3, start=1)
    exact = reference.rope(x.double(), cos, sin, interleaved, False)
    assert_parity(ops.rope(x, cos, sin, interleaved=interleaved), plain_rope(x, cos, sin, interleaved), exact)


def test_same_bits_for_any_number_of_threads(isa):
    x, (cos, sin) = random(3, 4, 333, 16), ops.rope_tables(16, 333)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.rope(x, cos, sin))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@both_layouts
def test_gradcheck(interleaved):
    x, (cos, sin) = random(2, 1, 3, 6, dtype=torch.float64).requires_grad_(), ops.rope_tables(4, 3)
    assert torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin, interleaved=interleaved), (x,))


@both_layouts
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_opcheck(interleaved, dtype):
    op, (cos, sin) = torch.ops.fastgpt.rope.default, ops.rope_tables(4, 3)
    opcheck(op, (random(2, 2, 3, 6, dtype=dtype).requires_grad_(), cos, sin, interleaved, False))
    opcheck(op, (random(2, 3, 2, 6, dtype=dtype).transpose(1, 2), cos, sin, interleaved, True))


def test_compile():
    x, (cos, sin) = random(2, 2, 3, 8).requires_grad_(), ops.rope_tables(8, 3)
    function = lambda x: ops.rope(x * 2, cos, sin).square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x))
    mine, theirs = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, function))
    torch.testing.assert_close(mine, theirs)


def test_autocast_keeps_the_dtype():
    cos, sin = ops.rope_tables(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.rope(random(1, 1, 3, 4), cos, sin).dtype == torch.float32


def test_tables():
    cos, sin = ops.rope_tables(6, 5, 100.0, start=2, scale=0.5)
    assert cos.shape == sin.shape == (5, 3)
    angle = 0.5 * 4 * 100.0 ** (-2 / 6)
    assert cos[2, 1].item() == pytest.approx(torch.tensor(angle, dtype=torch.float64).cos().item(), rel=1e-7)
    assert sin[2, 1].item() == pytest.approx(torch.tensor(angle, dtype=torch.float64).sin().item(), rel=1e-7)
    far = ops.rope_tables(128, 1, start=1_000_003)[0]  # float32 angles would be off by 0.06
    assert far[0, 0].item() == pytest.approx(torch.tensor(1_000_003.0, dtype=torch.float64).cos().item(), rel=1e-6)


def test_bad_input():
    x, (cos, sin) = random(1, 2, 3, 4), ops.rope_tables(4, 3)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\), expected \(B, H, T, D\)"):
        ops.rope(x[0, 0], cos, sin)
    with pytest.raises(ValueError, match=r"cos has shape \(2, 2\), expected \(T, P\) with T = 3"):
        ops.rope(x, cos[:2], sin)
    with pytest.raises(ValueError, match="sin has shape"):
        ops.rope(x, cos, sin[:, :1])
    with pytest.raises(ValueError, match="3 angles a position, expected at most half of D = 4"):
        ops.rope(x, *ops.rope_tables(6, 3))
    with pytest.raises(ValueError, match="cos requires a gradient"):
        ops.rope(x, cos.clone().requires_grad_(), sin)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        ops.rope(x.long(), cos, sin)
    with pytest.raises(ValueError, match="dim is 3"):
        ops.rope_tables(3, 4)
    with pytest.raises(ValueError, match="start -1"):
        ops.rope_tables(4, 4, start=-1)
