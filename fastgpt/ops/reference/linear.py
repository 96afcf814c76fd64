"""Linear layers with an activation and a residual."""

import torch
from torch import Tensor

from fastgpt.ops.reference.activation import by_name, derivative
from fastgpt.ops.reference.common import wide


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = wide(x) @ wide(weight).T
    return y if bias is None else y + wide(bias)


def project_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias in the formulas' type."""
    dy = wide(grad)
    rows = dy.reshape(-1, dy.shape[-1])
    return dy @ wide(weight), rows.T @ wide(x).reshape(-1, x.shape[-1]), rows.sum(0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """activation(x weight^T + bias) + residual, and the activation's derivative (empty where there is none or it is not kept)."""
    before = project(x, weight, bias)
    y = by_name(activation)(before)
    slope = derivative(before, activation).to(dtype) if activation and keeps else x.new_empty(0, dtype=dtype)
    return (y if residual is None else y + wide(residual)).to(dtype), slope


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of x weight^T + bias, empty where not needed."""
    dx, dweight, dbias = project_backward(grad, x, weight)
    return (
        dx.to(x.dtype) if needs_x else x.new_empty(0),
        dweight.to(weight.dtype) if needs_weight else weight.new_empty(0),
        dbias.to(weight.dtype) if needs_bias else weight.new_empty(0),
    )
