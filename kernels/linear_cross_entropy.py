"""The last projection and its loss, without the whole matrix of logits: torch's products (cuBLAS) around the kernels of cross_entropy.

Rows go in chunks. A chunk's logits become its losses and then, in their own memory, their gradient, which at once becomes the chunk's
part of the gradients of x and W: the gradients are made in the forward and only scaled in the backward (as in Liger Kernel, arXiv
2410.10989, section 3.2).
"""

import torch
from torch import Tensor

from fastgpt.kernels.cross_entropy import cross_entropy, cross_entropy_backward
from fastgpt.ops.linear_cross_entropy import device_chunk_rows

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's forward.

    Args:
        x: (N, C); weight: (V, C) with at least one class; target: (N) int64.
        reduction: "mean" over the targets that are not ignored, or "sum".
        dtype: of the logits and of the products.
        keeps: whether the gradients are wanted.

    Returns:
        The loss, a float32 scalar, and the gradients of x and weight in their dtypes, empty where not kept. The weight's is summed
        over the chunks in float32.
    """
    rows, classes = x.shape[0], weight.shape[0]
    narrow, cast = weight.to(dtype), x.to(dtype)
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    dx = x.new_empty(x.shape if keeps else 0)
    dweight = weight.new_zeros(weight.shape if keeps else 0, dtype=torch.float32)
    counted = (target != ignore_index).sum()
    grad = torch.ones((), dtype=torch.float32, device=x.device)
    if reduction == "mean":
        grad = grad / counted
    chunk = device_chunk_rows(rows, classes)
    for first in range(0, rows, chunk):
        here = slice(first, first + chunk)
        logits = cast[here] @ narrow.t()
        losses[here], lse = cross_entropy(logits, target[here], ignore_index, "none", label_smoothing)
        if not keeps:
            continue
        each = grad.expand(logits.shape[0])
        cross_entropy_backward(each, logits, target[here], lse, ignore_index, "none", label_smoothing, out=logits)
        dx[here] = logits @ narrow
        if rows <= chunk:
            dweight = logits.t() @ cast
        else:
            dweight += logits.t() @ cast[here]
    total = losses.sum()
    return total / counted if reduction == "mean" else total, dx, dweight.to(weight.dtype)
