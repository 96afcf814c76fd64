"""The Triton kernels of attention against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton_engine import DEVICE, DTYPES, check_op, gpu, opcheck, there, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.ops import reference

pytestmark = pytest.mark.usefixtures("triton_engine")

# (B, H, H_kv, Tq, Tk, D); the tiles are 16 to 128 queries by 16 to 128 keys
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 7, 16),
    (1, 4, 2, 5, 40, 24),
    (1, 2, 1, 130, 130, 64),
    (1, 1, 1, 70, 200, 33),
    (1, 2, 1, 150, 70, 16),  # under a causal mask the first 80 queries see nothing, which is more than a tile
    (1, 3, 1, 1, 100, 64),
    (1, 1, 1, 17, 65, 128),
    (1, 1, 1, 20, 35, 256),
]


def torch_attention(q, k, v, is_causal, scale=None):
    """torch's own, with our alignment of the causal mask; rows that see nothing are 0 there too."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    seen = seen.tril(k.shape[2] - q.shape[2]) if is_causal else seen
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)


def inputs(batch, heads, kv_heads, queries, keys, dim, dtype=torch.float32):
    shapes = ((batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


def check(leaves, is_causal, scale=None):
    used = scale or 1 / math.sqrt(leaves[0].shape[3])
    check_op(
        lambda q, k, v: ops.attention(q, k, v, is_causal=is_causal, scale=scale),
        lambda q, k, v: torch_attention(q, k, v, is_causal, scale),
        lambda q, k, v: reference.attention(q, k, v, is_causal, used)[0],
        leaves,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(dtype, is_causal, shape):
    check(inputs(*shape, dtype=dtype), is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_log_sum_exp(is_causal):
    q, k, v = inputs(1, 2, 1, 40, 30, 16)
    _, lse = torch.ops.fastgpt.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), is_causal, 0.25)
    exact = reference.attention(q.double(), k.double(), v.double(), is_causal, 0.25)[1]
    torch.testing.assert_close(lse.cpu().double(), exact, rtol=1e-6, atol=1e-6)  # -inf in the same places


@pytest.mark.parametrize("scale", [-0.7, 3.0])
def test_scale(scale):
    check(inputs(1, 1, 1, 20, 20, 16), True, scale)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_strides(is_causal):
    packed = random(2, 19, 3, 4, 16)  # (B, T, 3, H, D), as from one linear layer
    check([x.transpose(1, 2) for x in packed.unbind(2)], is_causal)
    q, k, v = inputs(1, 2, 2, 16, 19, 21)
    check([x.transpose(2, 3) for x in (q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous())], is_causal)
    check([x[:, :, ::2] for x in inputs(1, 2, 1, 16, 20, 16)], is_causal)


def test_the_gradient_of_any_strides():
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs(1, 2, 2, 9, 9, 16)]
    out = ops.attention(*leaves, is_causal=True)
    grad = random(1, 2, 16, 9, seed=4).to(DEVICE).mT
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(torch_attention(*leaves, True), leaves, grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    expanded = torch.autograd.grad(ops.attention(*leaves).sum(), leaves)  # strides 0
    torch.testing.assert_close(expanded, torch.autograd.grad(torch_attention(*leaves, False).sum(), leaves))


def test_merging_the_heads_copies_nothing():
    out = ops.attention(*(x.to(DEVICE) for x in inputs(2, 3, 3, 5, 5, 16)))
    assert out.transpose(1, 2).is_contiguous()


def test_no_keys_and_no_queries():
    for q, k in (((1, 2, 3, 16), (1, 2, 0, 16)), ((1, 2, 0, 16), (1, 2, 3, 16)), ((0, 2, 3, 16), (0, 2, 3, 16))):
        leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in (q, k, k)]
        out = ops.attention(*leaves)
        assert out.shape == q
        assert (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_a_row_of_nan_stays_a_row():
    q, k, v = inputs(1, 1, 1, 40, 40, 16)
    q[0, 0, 3, 5], q[0, 0, 20, 0] = float("nan"), float("inf")
    out = there(lambda q, k, v: ops.attention(q, k, v, is_causal=True))(q, k, v)
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [3, 20]


def test_same_bits_on_every_run():
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs(1, 4, 2, 70, 70, 32)]
    out = ops.attention(*leaves, is_causal=True)
    first, second = (torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs(1, 2, 1, 5, 7, 16)]
    opcheck(torch.ops.fastgpt.attention.default, (*leaves, True, 0.25))
    plain = [x.detach() for x in leaves]
    out, lse = torch.ops.fastgpt.attention(*plain, True, 0.25)
    opcheck(torch.ops.fastgpt.attention_backward.default, (out.clone(), *plain, out, lse, True, 0.25))


def test_what_is_not_covered():
    q, k, v = (x.to(DEVICE) for x in inputs(1, 1, 1, 3, 3, 257))
    with pytest.raises(NotImplementedError, match="a head size of 257; covered are sizes up to 256"):
        ops.attention(q, k, v)
    with pytest.raises(NotImplementedError, match="mixed dtypes"):
        torch.ops.fastgpt.attention(q, k.half(), v, False, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
    def test_parity(self, dtype, is_causal, dim):
        check(inputs(4, 12, 12, 1024, 1024, dim, dtype=dtype), is_causal)

    @pytest.mark.parametrize(
        "shape", [(2, 32, 8, 2048, 2048, 128), (2, 12, 12, 1, 4097, 64), (1, 16, 1, 777, 3000, 64)], ids=str
    )
    def test_grouped_and_uneven(self, dtype, is_causal, shape):
        check(inputs(*shape, dtype=dtype), is_causal)
