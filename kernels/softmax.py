"""softmax with a scale, an additive mask and a causal limit, and its gradient.

    v = scale * x + mask;   y = exp(v - max v) / sum exp(v - max v);   dx = scale * y * (dy - sum(dy * y))

over the last dimension. Rows of up to 16384 columns are read once and stay in registers, several short rows to a program. Wider
rows are read twice, the first time with the running maximum and sum of arXiv 1805.02867 (algorithm 3). Computed in fp32.

With is_causal, query i of `queries` sees keys j <= i + cols - queries. A row that sees nothing is NaN, as in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning
from fastgpt.ops.softmax import _as_4d

__all__ = ["softmax", "softmax_backward"]

ONE_BLOCK = 16384  # columns that a program keeps in registers: 32 fp32 values a thread with 16 warps
WIDE_BLOCK = 8192  # columns a step beyond that


@triton.jit
def _mask_rows(rows, heads, queries, stride_b, stride_h, stride_q):
    """Offset of each row's mask; rows are numbered (batch, head, query)."""
    batch_head = rows // queries
    return (batch_head // heads) * stride_b + (batch_head % heads) * stride_h + (rows % queries) * stride_q


@triton.jit
def softmax_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, scale, n_rows, heads, queries, cols, stride_b, stride_h, stride_q, stride_c,
    HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < n_rows) & (col < cols)
    seen = inside
    if IS_CAUSAL:
        seen = inside & (col <= rows % queries + cols - queries)
    v = tl.load(x_ptr + rows * cols + col, mask=seen, other=0.0).to(tl.float32) * scale  # (BLOCK_M, BLOCK_N)
    if HAS_MASK:
        mask_ptrs = (
            mask_ptr + _mask_rows(rows, heads, queries, stride_b, stride_h, stride_q) + col.to(tl.int64) * stride_c
        )
        v += tl.load(mask_ptrs, mask=seen, other=0.0).to(tl.float32)
    v = tl.where(seen, v, float("-inf"))
    e = tl.exp(v - tl.max(v, axis=1, keep_dims=True))
    y = e / tl.sum(e, axis=1, keep_dims=True)
    tl.store(y_ptr + rows * cols + col, y, mask=inside)


@triton.jit
def softmax_wide_fwd_kernel(
    x_ptr, mask_ptr, y_ptr, scale, heads, queries, cols, stride_b, stride_h, stride_q, stride_c,
    HAS_MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_N columns a step: first the maximum and the sum, then the result."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * cols
    y_ptr += row * cols
    if HAS_MASK:
        mask_ptr += _mask_rows(row, heads, queries, stride_b, stride_h, stride_q)
    limit = cols  # the row sees the columns below it
    if IS_CAUSAL:
        limit = tl.minimum((row % queries).to(tl.int32) + cols - queries + 1, cols)

    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, limit, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        v = tl.load(x_ptr + col, mask=col < limit, other=0.0).to(tl.float32) * scale
        if HAS_MASK:
            v += tl.load(mask_ptr + col.to(tl.int64) * stride_c, mask=col < limit, other=0.0).to(tl.float32)
        v = tl.where(col < limit, v, float("-inf"))
        new_top = tl.maximum(top, tl.max(v, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all -inf so far: keep the sum 0 instead of NaN
        total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base), axis=0)
        top = new_top

    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        v = tl.load(x_ptr + col, mask=col < limit, other=0.0).to(tl.float32) * scale
        if HAS_MASK:
            v += tl.load(mask_ptr + col.to(tl.int64) * stride_c, mask=col < limit, other=0.0).to(tl.float32)
        v = tl.where(col < limit, v, float("-inf"))
        tl.store(y_ptr + col, tl.exp(v - top) / total, mask=col < cols)


@triton.jit
def softmax_bwd_kernel(
    grad_ptr, y_ptr, dx_ptr, scale, n_rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < n_rows) & (col < cols)
    offsets = rows * cols + col
    g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dx = scale * y * (g - tl.sum(g * y, axis=1, keep_dims=True))
    tl.store(dx_ptr + offsets, dx, mask=inside)


@triton.jit
def softmax_wide_bwd_kernel(grad_ptr, y_ptr, dx_ptr, scale, cols, BLOCK_N: tl.constexpr):
    """One row a program, BLOCK_N columns a step: first the sum, then the result."""
    base = tl.program_id(0).to(tl.int64) * cols
    products = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        g = tl.load(grad_ptr + base + col, mask=col < cols, other=0.0).to(tl.float32)
        products += g * tl.load(y_ptr + base + col, mask=col < cols, other=0.0).to(tl.float32)
    total = tl.sum(products, axis=0)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        g = tl.load(grad_ptr + base + col, mask=col < cols, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + base + col, mask=col < cols, other=0.0).to(tl.float32)
        tl.store(dx_ptr + base + col, scale * y * (g - total), mask=col < cols)


def softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """The op's forward.

    Args:
        x: (..., queries, cols), any strides (copied where not contiguous).
        mask: broadcastable to x, any strides: read in place, a broadcast dimension with stride 0.
        scale, is_causal: see the module.

    Returns:
        x's shape and dtype, contiguous.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    batch, heads, queries, cols = _as_4d(x.shape)
    rows = batch * heads * queries
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(x.shape)
        mask = mask.reshape(batch, heads, queries, cols) if mask.dim() > 4 else mask
        strides = (0,) * (4 - mask.dim()) + mask.stride()
    shared = (heads, queries, cols, *strides, mask is not None, is_causal)
    if cols <= ONE_BLOCK:
        args = (x, mask, y, scale, rows, *shared)
        tuning.launch_rows(softmax_fwd_kernel, args, rows, cols, key=("n_rows", "cols", "HAS_MASK", "IS_CAUSAL"))
    else:
        softmax_wide_fwd_kernel[(rows,)](x, mask, y, scale, *shared, WIDE_BLOCK, num_warps=tuning.warps(x, WIDE_BLOCK))
    return y


def softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    """The gradient of x from that of y; both (..., cols), any strides. Returns grad's shape and dtype, contiguous."""
    grad, y = grad.contiguous(), y.contiguous()
    dx = torch.empty_like(grad)
    if grad.numel() == 0:
        return dx
    cols = grad.shape[-1]
    rows = grad.numel() // cols
    if cols <= ONE_BLOCK:
        tuning.launch_rows(softmax_bwd_kernel, (grad, y, dx, scale, rows, cols), rows, cols, key=("n_rows", "cols"))
    else:
        warps = tuning.warps(grad, WIDE_BLOCK)
        softmax_wide_bwd_kernel[(rows,)](grad, y, dx, scale, cols, WIDE_BLOCK, num_warps=warps)
    return dx
