"""log_softmax over one dimension. Formula in reference/."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _cpu(x: Tensor) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(x)
    x = x.contiguous()
    y = cpu.empty(x.shape, x.dtype)
    cpu.kernels.log_softmax(code, x.data_ptr(), y.data_ptr(), _rows(x), x.shape[-1], cpu.threads())
    return y


def _cpu_backward(grad: Tensor, y: Tensor) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(grad)
    grad, y = grad.contiguous(), y.contiguous()
    dx = cpu.empty(y.shape, y.dtype)
    cpu.kernels.log_softmax_backward(
        code, grad.data_ptr(), y.data_ptr(), dx.data_ptr(), _rows(y), y.shape[-1], cpu.threads()
    )
    return dx


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y: Tensor = below_autograd(_log_softmax, x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dx: Tensor = _log_softmax_backward(grad, y)
        return dx


_log_softmax = define(
    "log_softmax(Tensor x) -> Tensor",
    fake=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    reference=lambda x: reference.log_softmax(x).contiguous(),
    cpu=_cpu,
    autograd=_Rule,
)
_log_softmax_backward = define(
    "log_softmax_backward(Tensor grad, Tensor y) -> Tensor",
    fake=lambda grad, y: torch.empty_like(grad, memory_format=torch.contiguous_format),
    reference=lambda *args: reference.log_softmax_backward(*args).contiguous(),
    cpu=_cpu_backward,
)


def log_softmax(input: Tensor, dim: int = -1) -> Tensor:
    """input - logsumexp(input) over one dimension, computed in fp32 (fp64 for fp64).

    Args:
        input: any shape, any floating dtype.
        dim: the dimension whose exponentials sum to one.

    Returns:
        The input's shape and dtype, contiguous unless `dim` is not the last. A row that holds a NaN or +inf, or nothing but -inf, is
        NaN, as in torch.

    Raises:
        TypeError: an integer input. IndexError: a dimension that is not there.

    >>> log_softmax(torch.zeros(2))
    tensor([-0.6931, -0.6931])
    """
    if not input.is_floating_point():
        raise TypeError(f"log_softmax: input has dtype {input.dtype}, expected a floating-point dtype")
    if input.dim() == 0:
        return log_softmax(input[None], dim)[0]
    if dim not in (-1, input.dim() - 1):
        return log_softmax(input.movedim(dim, -1)).movedim(-1, dim)
    y: Tensor = _log_softmax(input)
    return y
