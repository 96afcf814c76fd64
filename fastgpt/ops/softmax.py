"""softmax with a scale, an additive mask and a causal limit fused in. Formula in reference/."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define


def _as_4d(shape: torch.Size) -> tuple[int, int, int, int]:
    """A shape as (batch, heads, queries, cols): missing dimensions are 1, those beyond four go into batch."""
    dims = [1] * (4 - len(shape)) + list(shape)
    batch = 1
    for dim in dims[:-3]:
        batch *= dim
    return batch, dims[-3], dims[-2], dims[-1]


def _cpu(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(x)
    batch, heads, queries, cols = _as_4d(x.shape)
    strides = [0, 0, 0]
    if mask is not None:
        if mask.dtype == torch.float64:
            raise NotCovered("a float64 mask")
        mask = mask.float()
        if mask.shape[-1] != cols or (cols > 1 and mask.stride(-1) != 1):
            mask = mask.expand(*mask.shape[:-1], cols).contiguous()
        mask = mask.expand(x.shape)
        if mask.dim() > 4:
            mask = mask.reshape(batch, heads, queries, cols)
        strides = [0] * (4 - mask.dim()) + list(mask.stride())[:-1] if mask.dim() > 1 else strides
    x = x.contiguous()
    y = cpu.empty(x.shape, x.dtype)
    cpu.kernels.softmax(
        code,
        x.data_ptr(),
        cpu.address(mask),
        strides,
        y.data_ptr(),
        batch,
        heads,
        queries,
        cols,
        scale,
        is_causal,
        cpu.threads(),
    )
    return y


def _cpu_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(grad)
    grad, y = grad.contiguous(), y.contiguous()
    dx = cpu.empty(grad.shape, grad.dtype)
    cols = grad.shape[-1]
    rows = grad.numel() // cols if cols else 0
    cpu.kernels.softmax_backward(code, grad.data_ptr(), y.data_ptr(), dx.data_ptr(), rows, cols, scale, cpu.threads())
    return dx


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
        if mask is not None and mask.requires_grad:
            raise NotImplementedError("softmax: mask requires a gradient, which this op does not compute")
        y: Tensor = below_autograd(_softmax, x, mask, scale, is_causal)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return _softmax_backward(grad, y, ctx.scale), None, None, None


_softmax = define(
    "softmax(Tensor x, Tensor? mask, float scale, bool is_causal) -> Tensor",
    fake=lambda x, mask, scale, is_causal: torch.empty_like(x, memory_format=torch.contiguous_format),
    reference=lambda *args: reference.softmax(*args).contiguous(),
    cpu=_cpu,
    autograd=_Rule,
)
_softmax_backward = define(
    "softmax_backward(Tensor grad, Tensor y, float scale) -> Tensor",
    fake=lambda grad, y, scale: torch.empty_like(grad, memory_format=torch.contiguous_format),
    reference=lambda *args: reference.softmax_backward(*args).contiguous(),
    cpu=_cpu_backward,
)


def softmax(
    input: Tensor, dim: int = -1, *, scale: float = 1.0, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """softmax(scale * input + mask) over one dimension, computed in fp32 (fp64 for fp64).

    Args:
        input: any shape, any floating dtype.
        dim: the dimension that sums to one.
        scale: multiplies the input first, as 1 / sqrt(D) does in attention.
        mask: broadcastable to the input; floating: added; bool: False positions are taken out. Has no gradient.
        is_causal: of the last two dimensions (Tq, Tk), query i sees keys j <= i + Tk - Tq; with Tq = 2, Tk = 4 (x: seen)

                x x x .
                x x x x

    Returns:
        The input's shape and dtype, contiguous unless `dim` is not the last. A row that sees nothing is NaN, as in torch.

    Raises:
        TypeError: an integer input. ValueError: is_causal with fewer than two dimensions or with dim not last.
        RuntimeError: a mask that does not broadcast.
    """
    if not input.is_floating_point():
        raise TypeError(f"softmax: input has dtype {input.dtype}, expected a floating-point dtype")
    last = dim in (-1, input.dim() - 1)
    if is_causal and (input.dim() < 2 or not last):
        raise ValueError(
            f"softmax: is_causal needs two dimensions and dim last, got {input.dim()} dimensions, dim={dim}"
        )
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        mask = mask.expand(torch.broadcast_shapes(mask.shape, input.shape))
        if mask.shape != input.shape:
            raise ValueError(
                f"softmax: mask of shape {tuple(mask.shape)} does not broadcast to the input's {tuple(input.shape)}"
            )
    if input.dim() == 0:
        return softmax(input[None], 0, scale=scale, mask=None if mask is None else mask[None])[0]
    if last:
        return _softmax(input, mask, scale, is_causal)
    mask = None if mask is None else mask.movedim(dim, -1)
    return _softmax(input.movedim(dim, -1), mask, scale, False).movedim(-1, dim)
