"""activation(x + bias) and its gradients. The sum is never in memory; the backward adds it up again where f'(x) asks for it.

In the backward a program walks through its share of the rows in its columns and keeps their part of the bias's gradient; torch adds the
parts, in a fixed order. Computed in fp32; the formulas of f stand in activation.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.activation import KEEPS_RESULT, activate, activate_backward
from fastgpt.kernels.launch import multiprocessors

__all__ = ["bias_activation", "bias_activation_backward"]

BLOCK_ROWS, BLOCK_COLS = 16, 128


@triton.jit
def bias_activation_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, rows, cols, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (col < cols)
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, activate(x + bias, KIND), mask=inside)


@triton.jit
def bias_activation_bwd_kernel(
    grad_ptr, saved_ptr, bias_ptr, dx_ptr, parts_ptr, rows, cols, rows_each,
    KIND: tl.constexpr, ADDS_BIAS: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`rows_each` rows a program, BLOCK_M a step; saved is x where ADDS_BIAS, else the result. parts: (programs, cols)."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, rows_each, BLOCK_M):
        row = program * rows_each + step + tl.arange(0, BLOCK_M)[:, None]
        inside = (row < rows) & (col < cols)
        grad = tl.load(grad_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(saved_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)
        if ADDS_BIAS:
            v += bias
        dx = activate_backward(grad, v, KIND)
        tl.store(dx_ptr + row * cols + col, dx, mask=inside)
        if NEEDS_BIAS:
            dbias += tl.where(inside, dx, 0.0)
    if NEEDS_BIAS:
        total = tl.sum(dbias, axis=0, keep_dims=True)
        tl.store(parts_ptr + program * cols + col, total, mask=col < cols)


def bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """f(x + bias): x (..., C), bias (C), dtypes may differ. Returns x's shape and dtype, contiguous."""
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    cols = bias.numel()
    if y.numel():
        rows = x.numel() // cols
        grid = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(cols, BLOCK_COLS)
        bias_activation_fwd_kernel[grid](x, bias, y, rows, cols, kind, BLOCK_ROWS, BLOCK_COLS, num_warps=4)
    return y


def bias_activation_backward(
    grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx in saved's shape and dtype, and the bias's gradient (C) in its own, empty unless asked for.

    `saved` is the result for KEEPS_RESULT of activation.py, else x.
    """
    grad, saved, bias = grad.contiguous(), saved.contiguous(), bias.contiguous()
    dx = torch.empty_like(saved)
    cols = bias.numel()
    rows = saved.numel() // cols if cols else 0
    if rows == 0:
        return dx, bias.new_zeros(cols if needs_bias else 0)
    across = triton.cdiv(cols, BLOCK_COLS)
    programs = max(1, min(4 * multiprocessors(saved) // across, triton.cdiv(rows, BLOCK_ROWS)))
    rows_each = triton.cdiv(triton.cdiv(rows, programs), BLOCK_ROWS) * BLOCK_ROWS
    programs = triton.cdiv(rows, rows_each)
    parts = bias.new_empty((programs, cols) if needs_bias else 0, dtype=torch.float32)
    bias_activation_bwd_kernel[(programs, across)](
        grad, saved, bias, dx, parts, rows, cols, rows_each, kind, kind not in KEEPS_RESULT, needs_bias, BLOCK_ROWS, BLOCK_COLS,
        num_warps=4,
    )  # fmt: skip
    return dx, parts.sum(0).to(bias.dtype) if needs_bias else bias.new_empty(0)
