"""Rotary position embedding (arXiv 2104.09864, equation 34): each pair (x1, x2) of a head's first 2 P elements becomes
(x1 cos - x2 sin, x2 cos + x1 sin); the rest stays. The inverse turn is the gradient. Computed in fp32."""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rope"]

TILE = 2048  # pairs a program, at most


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_b, stride_h, stride_t, heads, time, dim, pairs,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some heads of one position of one batch row; BLOCK_R elements hold what is not turned (0: nothing)."""
    place = tl.program_id(0).to(tl.int64)
    b, t = place // time, place % time
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (h < heads) & (p < pairs)
    cos = tl.load(cos_ptr + t * pairs + p, mask=p < pairs, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * pairs + p, mask=p < pairs, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    first = 2 * p if INTERLEAVED else p
    second = first + (1 if INTERLEAVED else pairs)
    x_ptr += b * stride_b + t * stride_t + h.to(tl.int64) * stride_h
    y_ptr += (place * heads + h) * dim
    x1 = tl.load(x_ptr + first, mask=inside).to(tl.float32)
    x2 = tl.load(x_ptr + second, mask=inside).to(tl.float32)
    tl.store(y_ptr + first, x1 * cos - x2 * sin, mask=inside)
    tl.store(y_ptr + second, x2 * cos + x1 * sin, mask=inside)
    if BLOCK_R:
        r = 2 * pairs + tl.arange(0, BLOCK_R)[None, :]
        rest = (h < heads) & (r < dim)
        tl.store(y_ptr + r, tl.load(x_ptr + r, mask=rest), mask=rest)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """The op: x (B, H, T, D) of any strides, copied where D is not contiguous; cos and sin (T, P), 2 P <= D.

    Returns:
        x's shape and dtype with the memory of (B, T, H, D).
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    (batch, heads, time, dim), pairs = x.shape, cos.shape[-1]
    y = x.new_empty((batch, time, heads, dim)).transpose(1, 2)
    if y.numel() == 0:
        return y
    if pairs == 0:
        return y.copy_(x)
    block_p = triton.next_power_of_2(pairs)
    block_h = min(triton.next_power_of_2(heads), max(1, TILE // block_p))
    rest = triton.next_power_of_2(dim - 2 * pairs) if dim > 2 * pairs else 0
    rope_kernel[(batch * time, triton.cdiv(heads, block_h))](
        x, cos, sin, y, x.stride(0), x.stride(1), x.stride(2), heads, time, dim, pairs, interleaved, inverse, block_h, block_p, rest,
        num_warps=4,
    )  # fmt: skip
    return y
