"""log_softmax over the last dimension and its gradient: y = (x - max x) - log sum exp(x - max x);  dx = g - exp(y) sum g.

A row that fits one block is read once; a longer one goes through with a running maximum and sum (arXiv 1805.02867), or a running sum,
and then a second time. Computed in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["log_softmax", "log_softmax_backward"]

BLOCK = 16384  # columns a step


@triton.jit
def log_softmax_fwd_kernel(x_ptr, y_ptr, cols, row_stride, ONE: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    y_ptr += row * cols
    col = tl.arange(0, BLOCK_N)
    if ONE:
        v = tl.load(x_ptr + col, mask=col < cols, other=float("-inf")).to(tl.float32)
        v -= tl.max(v, axis=0)
        total = tl.sum(tl.where(col < cols, tl.exp(v), 0.0), axis=0)
        tl.store(y_ptr + col, v - tl.log(total), mask=col < cols)
    else:
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, cols, BLOCK_N):
            v = tl.load(x_ptr + start + col, mask=start + col < cols, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(v, axis=0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all -inf so far: keep the sum 0 instead of NaN
            total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base), axis=0)
            top = new_top
        for start in range(0, cols, BLOCK_N):
            v = tl.load(x_ptr + start + col, mask=start + col < cols, other=0.0).to(tl.float32)
            tl.store(y_ptr + start + col, (v - top) - tl.log(total), mask=start + col < cols)


@triton.jit
def log_softmax_bwd_kernel(grad_ptr, y_ptr, dx_ptr, cols, ONE: tl.constexpr, BLOCK_N: tl.constexpr):
    start_of_row = tl.program_id(0).to(tl.int64) * cols
    grad_ptr += start_of_row
    y_ptr += start_of_row
    dx_ptr += start_of_row
    col = tl.arange(0, BLOCK_N)
    if ONE:
        g = tl.load(grad_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        tl.store(dx_ptr + col, g - tl.exp(y) * tl.sum(g, axis=0), mask=col < cols)
    else:
        total = tl.full((), 0.0, tl.float32)
        for start in range(0, cols, BLOCK_N):
            total += tl.sum(tl.load(grad_ptr + start + col, mask=start + col < cols, other=0.0).to(tl.float32), axis=0)
        for start in range(0, cols, BLOCK_N):
            g = tl.load(grad_ptr + start + col, mask=start + col < cols, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + start + col, mask=start + col < cols, other=0.0).to(tl.float32)
            tl.store(dx_ptr + start + col, g - tl.exp(y) * total, mask=start + col < cols)


def _block(cols: int) -> tuple[int, int]:
    """BLOCK_N and warps."""
    block = min(triton.next_power_of_2(cols), BLOCK)
    return block, max(1, min(16, block // 512))


def log_softmax(x: Tensor) -> Tensor:
    """The op's forward: x (..., N) with at least one column; the same shape and dtype, contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        block, warps = _block(rows.shape[1])
        log_softmax_fwd_kernel[(rows.shape[0],)](
            rows, y, rows.shape[1], rows.stride(0), rows.shape[1] <= block, block, num_warps=warps
        )
    return y


def log_softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of x from that of y and y itself: (..., N), contiguous."""
    grad, y = grad.contiguous(), y.contiguous()
    dx = torch.empty_like(grad)
    if dx.numel():
        cols = grad.shape[-1]
        block, warps = _block(cols)
        log_softmax_bwd_kernel[(dx.numel() // cols,)](grad, y, dx, cols, cols <= block, block, num_warps=warps)
    return dx
