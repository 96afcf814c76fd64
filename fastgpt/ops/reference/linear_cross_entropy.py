"""The last projection and its cross-entropy."""

import torch
from torch import Tensor

from fastgpt.ops.reference.cross_entropy import cross_entropy, cross_entropy_backward
from fastgpt.ops.reference.linear import project, project_backward


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the logits x weight^T and the gradients of x and weight (empty where not kept)."""
    logits = project(x, weight, None).to(dtype)
    loss, lse = cross_entropy(logits, target, ignore_index, reduction, label_smoothing)
    if not keeps:
        return loss, x.new_empty(0), weight.new_empty(0)
    grad = cross_entropy_backward(torch.ones_like(loss), logits, target, lse, ignore_index, reduction, label_smoothing)
    dx, dweight, _ = project_backward(grad, x, weight)
    return loss, dx.to(x.dtype), dweight.to(weight.dtype)
