"""Softmax with a scale, a mask and a causal limit."""

import math

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool, True where query i may see key j: j <= i + keys - queries, aligned to the bottom right."""
    i = torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    return j <= i + keys - queries


def softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """exp(v - max v) / sum exp(v - max v) over the last dimension, v = scale * x + mask."""
    v = wide(x) * scale
    if mask is not None:
        v = v + mask
    if is_causal:
        v = v.masked_fill(~causal_mask(x.shape[-2], x.shape[-1], x.device), -math.inf)
    if v.shape[-1] == 0:
        return v.to(x.dtype)
    e = torch.exp(v - v.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    g, p = wide(grad), wide(y)
    return (scale * p * (g - (g * p).sum(-1, keepdim=True))).to(grad.dtype)
