"""Layer norm, arXiv 1607.06450."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / standard deviation over the last dimension; the statistics have x's shape less that dimension."""
    v = wide(x)
    mean = v.mean(-1)
    centred = v - mean[..., None]
    rstd = 1 / torch.sqrt((centred**2).mean(-1) + eps)
    y = centred * rstd[..., None]
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two are empty where `needs_params` is false."""
    dy = wide(grad)
    xhat = (wide(x) - mean[..., None]) * rstd[..., None]
    g = dy if weight is None else dy * wide(weight)
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    param_dtype = x.dtype if weight is None else weight.dtype
    if not needs_params:
        return dx.to(x.dtype), x.new_empty(0, dtype=param_dtype), x.new_empty(0, dtype=param_dtype)
    rows = (-1, x.shape[-1])
    dweight = (dy * xhat).reshape(rows).sum(0).to(param_dtype)
    return dx.to(x.dtype), dweight, dy.reshape(rows).sum(0).to(param_dtype)
