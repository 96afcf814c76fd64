"""Gated linear units without their matrix products: y = f(gate) * up, f silu (swiglu) or one of the two gelus (geglu).

arXiv 2002.05202, equations 5 and 6; f and its gradient are those of activation.py. A program takes a tile of whole or part rows, so
that the two halves of one tensor are read, and their gradient is written, where they are. Each value is read and written once.

    dgate = dy * up * f'(gate);   dup = dy * f(gate)
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning
from fastgpt.kernels.activation import activate, activate_backward
from fastgpt.ops.swiglu import _geometry, _halves, _rows

__all__ = ["gated", "gated_backward"]

KINDS = ("silu", "gelu", "gelu_tanh")
CHOICES = (1024, 2048, 4096, 8192)  # elements of a tile


@triton.jit
def _tile(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M, 1) and columns (1, BLOCK_N) of this program's tile, in 64 bits, and what of it is inside; columns run fastest."""
    across = tl.cdiv(cols, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    row = (program // across * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (program % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return row, col, (row < rows) & (col < cols)


@triton.jit
def gated_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, rows, cols, gate_stride, up_stride,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y (rows, cols), contiguous; gate and up with their own steps from row to row."""
    row, col, inside = _tile(rows, cols, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, activate(gate, KIND) * up, mask=inside)


@triton.jit
def gated_bwd_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, cols, gate_stride, up_stride, into_stride,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dgate and dup; the gradient of y is contiguous, both results have the step into_stride."""
    row, col, inside = _tile(rows, cols, BLOCK_M, BLOCK_N)
    grad = tl.load(grad_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + row * into_stride + col, activate_backward(grad * up, gate, KIND), mask=inside)
    tl.store(dup_ptr + row * into_stride + col, grad * activate(gate, KIND), mask=inside)


def _launch(kernel: Any, args: tuple[Any, ...], rows: int, cols: int, kind: str) -> None:
    """Start a kernel over tiles of (rows, cols)."""

    def tile(elements: int) -> dict[str, int]:
        block_n = min(triton.next_power_of_2(cols), elements)
        block_m = min(elements // block_n, triton.next_power_of_2(rows))
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": tuning.warps(args[0], block_m * block_n)}

    def grid(tile: Mapping[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(cols, tile["BLOCK_N"]),)

    choices = [tile(elements) | {"num_warps": warps} for elements in CHOICES for warps in (4, 8)]
    chosen = tile(tuning.sizes(args[0]).elements)
    tuning.launch(kernel, grid, args, chosen, choices, ("rows", "cols", "KIND"), KIND=kind)


def gated(kind: str, gate: Tensor, up: Tensor | None) -> Tensor:
    """f(gate) * up, f one of KINDS.

    Args:
        gate: (..., cols), or with up None (..., 2 * cols), which holds both halves. Any strides; rows evenly apart are not copied.
        up: as gate, of the same dtype, or None.

    Returns:
        (..., cols) in gate's dtype, contiguous.
    """
    gate, up = _halves(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    rows, cols = _geometry(y, gate_stride, up_stride)
    _launch(gated_fwd_kernel, (gate, up, y, rows, cols, gate_stride, up_stride), rows, cols, kind)
    return y


def gated_backward(kind: str, grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of y, contiguous; with up None both in the first, and the second empty."""
    packed = up is None
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _halves(gate, up)
    dup = torch.empty(0 if packed else up.shape, dtype=gate.dtype, device=gate.device)
    if grad.numel() == 0:
        return dgate, dup
    grad, into_stride, size = grad.contiguous(), dgate.shape[-1], up.shape[-1]
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    rows, cols = _geometry(grad, gate_stride, up_stride, into_stride)
    second = dgate[..., size:] if packed else dup
    args = (grad, gate, up, dgate, second, rows, cols, gate_stride, up_stride, into_stride)
    _launch(gated_bwd_kernel, args, rows, cols, kind)
    return dgate, dup
