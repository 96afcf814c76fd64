"""Residual and norm: the sum is rounded to its dtype before it is normalised, as in x + residual alone."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide
from fastgpt.ops.reference.layer_norm import layer_norm, layer_norm_backward
from fastgpt.ops.reference.rms_norm import rms_norm, rms_norm_backward


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum, mean and 1 / standard deviation."""
    summed = x + residual
    y, mean, rstd = layer_norm(summed, weight, bias, eps)
    return y, summed, mean, rstd


def add_layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_params: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of both addends, the same in bf16 (empty unless `needs_half`), dweight and dbias."""
    dx, dweight, dbias = layer_norm_backward(grad.to(rstd.dtype), wide(summed), weight, mean, rstd, needs_params)
    dx, half = _with_gradient_of_sum(dx, grad_sum, summed, needs_half)
    return dx, half, _like_params(dweight, summed, weight), _like_params(dbias, summed, weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum and 1 / root mean square."""
    summed = x + residual
    y, rstd = rms_norm(summed, weight, eps)
    return y, summed, rstd


def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of both addends, the same in bf16 (empty unless `needs_half`), and dweight."""
    dx, dweight = rms_norm_backward(grad.to(rstd.dtype), wide(summed), weight, rstd, needs_weight)
    dx, half = _with_gradient_of_sum(dx, grad_sum, summed, needs_half)
    return dx, half, _like_params(dweight, summed, weight)


def _with_gradient_of_sum(
    dx: Tensor, grad_sum: Tensor | None, summed: Tensor, needs_half: bool
) -> tuple[Tensor, Tensor]:
    dx = dx if grad_sum is None else dx + wide(grad_sum)
    half = dx.to(torch.bfloat16) if needs_half else dx.new_empty(0, dtype=torch.bfloat16)
    return dx.to(summed.dtype), half


def _like_params(gradient: Tensor, summed: Tensor, weight: Tensor | None) -> Tensor:
    return gradient.to(summed.dtype if weight is None else weight.dtype)
