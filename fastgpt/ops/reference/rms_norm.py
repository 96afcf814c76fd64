"""RMS norm, arXiv 1910.07467, equation 4."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y and 1 / root mean square over the last dimension."""
    v = wide(x)
    rstd = 1 / torch.sqrt((v**2).mean(-1) + eps)
    y = v * rstd[..., None]
    if weight is not None:
        y = y * wide(weight)
    return y.to(x.dtype), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dweight, which is empty where `needs_weight` is false."""
    dy = wide(grad)
    xhat = wide(x) * rstd[..., None]
    g = dy if weight is None else dy * wide(weight)
    dx = rstd[..., None] * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    param_dtype = x.dtype if weight is None else weight.dtype
    if not needs_weight:
        return dx.to(x.dtype), x.new_empty(0, dtype=param_dtype)
    return dx.to(x.dtype), (dy * xhat).reshape(-1, x.shape[-1]).sum(0).to(param_dtype)
