"""RMS normalisation over the last dimensions (arXiv 1910.07467). Formula in reference/, kernel in csrc/cpu/layer_norm.inl."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define
from fastgpt.ops.layer_norm import check_norm, flatten_norm, run_cpu, run_cpu_backward


def _cpu(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = run_cpu(x, None, weight, None, eps, rms=True)
    return y, rstd


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dx, _, dweight, _ = run_cpu_backward(grad, None, x, weight, None, rstd, needs_weight)
    return dx, dweight


def _fake(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=statistics)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(x.shape[-1] if needs_weight else 0, dtype=x.dtype if weight is None else weight.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd = below_autograd(_rms_norm, x, weight, eps)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_weight, _eps = ctx.needs_input_grad
        dx, dweight = _rms_norm_backward(grad, x, weight, rstd, needs_weight)
        return dx if needs_x else None, dweight if needs_weight else None, None


_rms_norm = define(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    fake=_fake,
    reference=lambda *args: tuple(result.contiguous() for result in reference.rms_norm(*args)),
    cpu=_cpu,
    autograd=_Rule,
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, bool needs_weight) -> (Tensor, Tensor)",
    fake=_fake_backward,
    reference=lambda *args: tuple(result.contiguous() for result in reference.rms_norm_backward(*args)),
    cpu=_cpu_backward,
)


def default_eps(dtype: torch.dtype) -> float:
    """torch's choice where eps is None: the machine epsilon of the type that is computed in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions, computed in fp32 (fp64 for fp64).

    Args:
        input: (..., *normalized_shape), any floating dtype.
        normalized_shape: the sizes of the last dimensions, which are normalised together.
        weight: of shape `normalized_shape`, the input's dtype or, for a half-type input, float32.
        eps: added to the mean square; None for the machine epsilon of the type that is computed in, as in torch.

    Returns:
        The input's shape and dtype, contiguous.

    Raises:
        TypeError: an integer input. ValueError: `normalized_shape` or the weight's shape does not fit.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    shape = check_norm("rms_norm", input, normalized_shape, weight, None)
    eps = default_eps(input.dtype) if eps is None else eps
    if len(shape) == 1:
        y: Tensor = _rms_norm(input, weight, eps)[0]
        return y
    return _rms_norm(*flatten_norm(shape, input, weight), eps)[0].reshape(input.shape)
