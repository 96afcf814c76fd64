"""LayerNorm (arXiv 1607.06450) and RMS norm (arXiv 1910.07467) over the last dimension, alone or after a residual, and their gradients.

    mean = sum x / N;   var = sum (x - mean)^2 / N;   rstd = 1 / sqrt(var + eps);   xhat = (x - mean) * rstd
    y = xhat * weight + bias

    g = dy * weight;   dx = rstd * (g - sum g / N - xhat * sum(g * xhat) / N)
    dweight = sum over rows of dy * xhat;   dbias = sum over rows of dy

RMS norm is the same with mean, sum g and bias left out. With a residual x is the sum of both, rounded to its dtype before it is
normalised; the backward then adds the gradient of the sum, and may write the result in bf16, too, for an addend of that dtype.

Rows of up to 8192 columns stay in registers, read once; wider ones are read in steps. The variance is of the centred values, so a large
mean does not cancel. In the backward each program walks through its own share of the rows and keeps their part of dweight and dbias; a
second kernel adds the parts in a fixed order, so results are the same bits on every run (no atomics). Computed in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning
from fastgpt.kernels.launch import multiprocessors

__all__ = ["add_layer_norm", "add_norm_backward", "add_rms_norm", "layer_norm", "layer_norm_backward", "rms_norm"]

ONE_BLOCK = 8192  # columns that a program keeps in registers, with their two gradients in the backward
ONE_BLOCK_OF_SUM = 4096  # the same in the backward of a sum that has a gradient, too: 8,192 spill
BACKWARD_ELEMENTS = 2048  # of short rows together in the backward: with 4,096 sm_100 spills
WIDE_BLOCK = 4096  # columns a step beyond that
PART_ROWS = 32  # partial sums added a step
PART_COLS = 64  # columns of a program that adds partial sums
KEY = ("n_rows", "cols", "RMS", "HAS_WEIGHT")  # what a measured tile is kept by
WIDE_ROWS = 256  # rows of a program that sums the parameters' gradients of wide rows


@triton.jit
def _load(ptr, col, cols, HAS: tl.constexpr, DEFAULT: tl.constexpr):
    """An optional parameter in fp32, DEFAULT where it is not there."""
    return (
        tl.load(ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        if HAS
        else tl.full(col.shape, DEFAULT, tl.float32)
    )


@triton.jit
def _input(x_ptr, residual_ptr, sum_ptr, offsets, inside, HAS_RESIDUAL: tl.constexpr):
    """What is normalised, in fp32: x, or its sum with the residual as the sum's dtype holds it."""
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, n_rows, cols, eps,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < n_rows)[:, None] & (col < cols)
    offsets = row[:, None] * cols + col
    x = _input(x_ptr, residual_ptr, sum_ptr, offsets, inside, HAS_RESIDUAL)  # (BLOCK_M, BLOCK_N)
    if HAS_RESIDUAL:
        tl.store(sum_ptr + offsets, x, mask=inside)
    if RMS:
        centred = x
    else:
        mean = tl.sum(x, axis=1) / cols
        centred = tl.where(inside, x - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean, mask=row < n_rows)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / cols + eps)
    y = centred * rstd[:, None] * _load(weight_ptr, col, cols, HAS_WEIGHT, 1.0)
    y += _load(bias_ptr, col, cols, HAS_BIAS, 0.0)
    tl.store(y_ptr + offsets, y, mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@triton.jit
def layer_norm_wide_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, cols, eps,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_N columns a step: the mean, then the variance, then the result."""
    first = tl.program_id(0).to(tl.int64) * cols
    mean = tl.full((), 0.0, tl.float32)
    if not RMS:
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, cols, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)
            sums += _input(x_ptr, residual_ptr, sum_ptr, first + col, col < cols, HAS_RESIDUAL)
        mean = tl.sum(sums, axis=0) / cols
        tl.store(mean_ptr + tl.program_id(0), mean)

    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = _input(x_ptr, residual_ptr, sum_ptr, first + col, col < cols, HAS_RESIDUAL)
        centred = tl.where(col < cols, x - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / cols + eps)

    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = _input(x_ptr, residual_ptr, sum_ptr, first + col, col < cols, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(sum_ptr + first + col, x, mask=col < cols)
        y = (x - mean) * rstd * _load(weight_ptr, col, cols, HAS_WEIGHT, 1.0)
        y += _load(bias_ptr, col, cols, HAS_BIAS, 0.0)
        tl.store(y_ptr + first + col, y, mask=col < cols)
    tl.store(rstd_ptr + tl.program_id(0), rstd)


@triton.jit
def _store_gradient(
    dx_ptr, grad_sum_ptr, half_ptr, offsets, inside, dx, HAS_GRAD_SUM: tl.constexpr, NEEDS_HALF: tl.constexpr
):  # fmt: skip
    """dx with the gradient that the sum itself has, in dx's dtype and, where asked for, in bf16."""
    if HAS_GRAD_SUM:
        dx += tl.load(grad_sum_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx, mask=inside)
    if NEEDS_HALF:
        tl.store(half_ptr + offsets, dx, mask=inside)


@triton.jit
def layer_norm_bwd_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, half_ptr, parts_ptr, n_rows, cols, rows_each,
    RMS: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, NEEDS_HALF: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEEDS_PARAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`rows_each` neighbouring rows a program, BLOCK_M a step; parts (programs, 2, cols) takes their share of dweight and dbias."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)[None, :]
    weight = _load(weight_ptr, col, cols, HAS_WEIGHT, 1.0)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    stop = tl.minimum(program * rows_each + rows_each, n_rows)
    for step in range(0, rows_each, BLOCK_M):
        row = program * rows_each + step + tl.arange(0, BLOCK_M)
        inside = (row < stop)[:, None] & (col < cols)
        offsets = row[:, None] * cols + col
        dy = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < stop, other=0.0)
        g = dy * weight
        if RMS:
            xhat = tl.where(inside, x * rstd[:, None], 0.0)
            mean_gx = tl.sum(g * xhat, axis=1) / cols
            dx = rstd[:, None] * (g - xhat * mean_gx[:, None])
        else:
            mean = tl.load(mean_ptr + row, mask=row < stop, other=0.0)
            xhat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
            mean_g = tl.sum(g, axis=1) / cols
            mean_gx = tl.sum(g * xhat, axis=1) / cols
            dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        _store_gradient(dx_ptr, grad_sum_ptr, half_ptr, offsets, inside, dx, HAS_GRAD_SUM, NEEDS_HALF)
        if NEEDS_PARAMS:
            dweight += dy * xhat
            if not RMS:
                dbias += dy
    if NEEDS_PARAMS:
        part = parts_ptr + program * 2 * cols + tl.arange(0, BLOCK_N)
        tl.store(part, tl.sum(dweight, axis=0), mask=tl.arange(0, BLOCK_N) < cols)
        if not RMS:
            tl.store(part + cols, tl.sum(dbias, axis=0), mask=tl.arange(0, BLOCK_N) < cols)


@triton.jit
def layer_norm_wide_bwd_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, half_ptr, cols,
    RMS: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, NEEDS_HALF: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of one row a program, BLOCK_N columns a step: the two sums, then the result."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.full((), 0.0, tl.float32)
    if not RMS:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros((BLOCK_N,), tl.float32)
    sum_gx = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        g *= _load(weight_ptr, col, cols, HAS_WEIGHT, 1.0)
        sum_g += g
        sum_gx += tl.where(col < cols, g * ((x - mean) * rstd), 0.0)
    mean_g = tl.full((), 0.0, tl.float32)
    if not RMS:
        mean_g = tl.sum(sum_g, axis=0) / cols
    mean_gx = tl.sum(sum_gx, axis=0) / cols
    for start in range(0, cols, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        g *= _load(weight_ptr, col, cols, HAS_WEIGHT, 1.0)
        dx = rstd * (g - mean_g - (x - mean) * rstd * mean_gx)
        _store_gradient(dx_ptr, grad_sum_ptr, half_ptr, row * cols + col, col < cols, dx, HAS_GRAD_SUM, NEEDS_HALF)


@triton.jit
def layer_norm_wide_parts_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, parts_ptr, n_rows, cols, rows_each, RMS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The share of dweight and dbias of `rows_each` rows in BLOCK_N columns a program, for rows that do not fit a block."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(program * rows_each, tl.minimum(program * rows_each + rows_each, n_rows)):
        dy = tl.load(grad_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        if not RMS:
            x -= tl.load(mean_ptr + row)
            dbias += dy
        dweight += dy * (x * tl.load(rstd_ptr + row))
    tl.store(parts_ptr + program * 2 * cols + col, dweight, mask=col < cols)
    if not RMS:
        tl.store(parts_ptr + program * 2 * cols + cols + col, dbias, mask=col < cols)


@triton.jit
def layer_norm_sum_kernel(
    parts_ptr, dweight_ptr, dbias_ptr, n_parts, cols, RMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """dweight and dbias from parts (n_parts, 2, cols): BLOCK_N columns a program, BLOCK_M parts a step."""
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_parts, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)[:, None]
        inside = (part < n_parts) & (col < cols)
        offsets = part.to(tl.int64) * 2 * cols + col
        dweight += tl.load(parts_ptr + offsets, mask=inside, other=0.0)
        if not RMS:
            dbias += tl.load(parts_ptr + offsets + cols, mask=inside, other=0.0)
    tl.store(dweight_ptr + col, tl.sum(dweight, axis=0, keep_dims=True), mask=col < cols)
    if not RMS:
        tl.store(dbias_ptr + col, tl.sum(dbias, axis=0, keep_dims=True), mask=col < cols)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum (x itself without a residual), mean (empty for RMS norm) and rstd."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=dtype)
    summed = x if residual is None else torch.empty_like(y)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    rows, cols = rstd.numel(), x.shape[-1]
    if rows == 0:
        return y, summed, mean, rstd
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    flags = rms, residual is not None, weight is not None, bias is not None
    if cols <= ONE_BLOCK:
        args = (x, residual, weight, bias, y, summed, mean, rstd, rows, cols, eps, *flags)
        tuning.launch_rows(layer_norm_fwd_kernel, args, rows, cols, KEY, arrays=1 if residual is None else 4)
    else:
        warps = tuning.warps(x, WIDE_BLOCK)
        layer_norm_wide_fwd_kernel[(rows,)](
            x, residual, weight, bias, y, summed, mean, rstd, cols, eps, *flags, WIDE_BLOCK, num_warps=warps
        )
    return y, summed, mean, rstd


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward.

    Args:
        x: (..., cols) with at least one column, any strides (copied where not contiguous).
        weight, bias: (cols), each of any covered dtype.

    Returns:
        y in x's shape and dtype, mean and rstd in x's shape less the last dimension and float32; all contiguous.
    """
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, rms=False)
    return y, mean, rstd


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y and rstd, as of `layer_norm`."""
    y, _, _, rstd = _forward(x, None, weight, None, eps, rms=True)
    return y, rstd


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and the sum in the dtype that x + residual has, mean and rstd; x and residual of one shape."""
    return _forward(x, residual, weight, bias, eps, rms=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and rstd, as of `add_layer_norm`."""
    y, summed, _, rstd = _forward(x, residual, weight, None, eps, rms=True)
    return y, summed, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias from that of y; without a mean those of RMS norm, whose bias has none.

    Args:
        grad, x: (..., cols), any strides, dtypes may differ.
        weight: (cols) or None.
        mean, rstd: the forward's, float32.
        needs_params: whether dweight and dbias are asked for.

    Returns:
        dx in x's shape and dtype; dweight and dbias (cols) in weight's dtype, x's where there is no weight, empty where not asked for.
    """
    dx, _, dweight, dbias = add_norm_backward(grad, None, x, weight, mean, rstd, needs_params, needs_half=False)
    return dx, dweight, dbias


def add_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, needs_params: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same where x is a sum: its own gradient grad_sum joins dx, which comes in bf16, too, where needs_half is set (else empty)."""
    grad, x, rstd = grad.contiguous(), x.contiguous(), rstd.contiguous()
    grad_sum, weight, mean = (None if t is None else t.contiguous() for t in (grad_sum, weight, mean))
    rows, cols = rstd.numel(), x.shape[-1]
    dx = torch.empty_like(x)
    half = x.new_empty(x.shape if needs_half else 0, dtype=torch.bfloat16)
    dweight = x.new_zeros(cols if needs_params else 0, dtype=x.dtype if weight is None else weight.dtype)
    dbias = torch.zeros_like(dweight)
    if rows == 0:
        return dx, half, dweight, dbias
    rms = mean is None
    flags = rms, grad_sum is not None, needs_half, weight is not None
    if cols <= (ONE_BLOCK if grad_sum is None else min(ONE_BLOCK, ONE_BLOCK_OF_SUM)):
        block_m, block_n = tuning.tile(x, rows, cols, BACKWARD_ELEMENTS)
        # more programs hide more latency, and write more partial sums; short rows leave registers for four on a multiprocessor
        programs = min((4 if block_n <= 2048 else 2) * multiprocessors(x), triton.cdiv(rows, block_m))
        rows_each = triton.cdiv(triton.cdiv(rows, programs), block_m) * block_m
        programs = triton.cdiv(rows, rows_each)
        parts = x.new_empty((programs, 2, cols) if needs_params else 0, dtype=torch.float32)
        args = (grad, grad_sum, x, weight, mean, rstd, dx, half, parts, rows, cols, rows_each, *flags, needs_params)
        tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": tuning.warps(x, 2 * block_m * block_n)}
        choices = [tile | {"num_warps": warps} for warps in (4, 8, 16)]
        tuning.launch(layer_norm_bwd_kernel, lambda _: (programs,), args, tile, choices, (*KEY, "HAS_GRAD_SUM"))
    else:
        layer_norm_wide_bwd_kernel[(rows,)](
            grad, grad_sum, x, weight, mean, rstd, dx, half, cols, *flags, WIDE_BLOCK, num_warps=16
        )
        programs = triton.cdiv(rows, WIDE_ROWS)
        parts = x.new_empty((programs, 2, cols) if needs_params else 0, dtype=torch.float32)
        if needs_params:
            layer_norm_wide_parts_kernel[(programs, triton.cdiv(cols, 1024))](
                grad, x, mean, rstd, parts, rows, cols, WIDE_ROWS, rms, 1024, num_warps=4
            )
    if needs_params:
        layer_norm_sum_kernel[(triton.cdiv(cols, PART_COLS),)](
            parts, dweight, dbias, programs, cols, rms, PART_ROWS, PART_COLS, num_warps=4
        )
    return dx, half, dweight, dbias
