"""Rotary position embedding, arXiv 2104.09864, equation 34."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Each pair (x1, x2) of the first 2 * cos.shape[-1] elements becomes (x1 cos - x2 sin, x2 cos + x1 sin)."""
    pairs = cos.shape[-1]
    v = wide(x)
    c, s = cos.to(v.dtype), sin.to(v.dtype)
    s = -s if inverse else s
    turned, rest = v.split((2 * pairs, x.shape[-1] - 2 * pairs), -1)
    a, b = turned.unflatten(-1, (pairs, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    parts = a * c - b * s, b * c + a * s
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1).to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
