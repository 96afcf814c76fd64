"""The logarithm of softmax."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def log_softmax(x: Tensor) -> Tensor:
    """(x - max x) - log sum exp(x - max x) over the last dimension."""
    if x.shape[-1] == 0:
        return x.clone()
    v = wide(x)
    v = v - v.amax(-1, keepdim=True)
    return (v - torch.log(torch.exp(v).sum(-1, keepdim=True))).to(x.dtype)


def log_softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    g = wide(grad)
    return (g - torch.exp(wide(y)) * g.sum(-1, keepdim=True)).to(grad.dtype)
