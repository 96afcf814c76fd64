"""The engine `cuda`: cross-entropy, its gradient in the logits' place, and the last projection with its loss in chunks.

Nothing here waits for the device: how many targets count is counted there, and a target outside the classes makes its row's loss and
gradient NaN instead of raising.
"""

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.backend import NotCovered, implement
from fastgpt.ops.linear_cross_entropy import device_chunk_rows

_MAX_COLS = 2**31 - 1


def _count(target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """How many targets a mean is over, on the device; None for the other reductions."""
    if reduction != "mean":
        return None
    counted = torch.empty((), dtype=torch.float64, device=target.device)
    cuda._launch("count_targets", target.device, target, counted, target.numel(), ignore_index)
    return counted


def _covered(logits: Tensor, *others: Tensor) -> int:
    cuda._check(logits, *others)
    if logits.shape[-1] > _MAX_COLS or logits.shape[-1] == 0:
        raise NotCovered(f"{logits.shape[-1]} classes")
    return cuda._code(logits)


def _forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    dlogits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    code = _covered(logits, target)
    target = target.contiguous()
    rows, cols = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float64, device=logits.device)
    loss = None if reduction == "none" else losses.new_empty(())
    count = _count(target, ignore_index, reduction)
    cuda._launch(
        "cross_entropy", logits.device, code, logits, target, losses, loss, lse, count, dlogits, rows, cols, ignore_index,
        label_smoothing, z_loss,
    )  # fmt: skip
    return losses if loss is None else loss, lse


@implement("cross_entropy", "cuda")
def _cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _forward(logits.contiguous(), target, ignore_index, reduction, label_smoothing, z_loss, None)


@implement("cross_entropy_inplace", "cuda")
def _cross_entropy_inplace(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor:
    if not logits.is_contiguous():
        raise NotCovered("logits that are not contiguous")
    return _forward(logits, target, ignore_index, reduction, label_smoothing, z_loss, logits)[0]


@implement("cross_entropy_backward", "cuda")
def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    code = _covered(logits, target, grad, lse)
    logits, target, grad = logits.contiguous(), target.contiguous(), grad.float().contiguous()
    rows, cols = logits.shape
    dlogits = torch.empty_like(logits)
    count = _count(target, ignore_index, reduction)
    cuda._launch(
        "cross_entropy_backward", logits.device, code, logits, target, grad, reduction == "none", lse, count, dlogits, rows, cols,
        ignore_index, label_smoothing, z_loss,
    )  # fmt: skip
    return dlogits


@implement("cross_entropy_inplace_backward", "cuda")
def _scale_rows(x: Tensor, factor: Tensor) -> None:
    """x times one number, or one a row, in place; nothing is read where that is 1."""
    cuda._check(x, factor)
    code = cuda._code(x)
    if not x.is_contiguous():
        raise NotCovered("a matrix that is not contiguous")
    factor = factor.float().contiguous()
    cuda._launch("scale_rows", x.device, code, x, factor, factor.dim() > 0, *x.shape)


@implement("linear_cross_entropy", "cuda")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Torch's products around our kernel: a chunk's logits become their gradient, and at once its part of those of x and W."""
    cuda._check(x, weight, target)
    for tensor in (x, weight):
        cuda._code(tensor)
    if dtype not in cuda._CODES:
        raise NotCovered(f"logits of {dtype}")
    (rows, _), classes = x.shape, weight.shape[0]
    if rows == 0 or classes == 0:
        raise NotCovered("no rows or no classes")
    target = target.contiguous()
    count = _count(target, ignore_index, reduction)
    half, weight_half = x.to(dtype), weight.to(dtype)
    dx = torch.empty_like(half) if keeps else half.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if keeps else weight.new_empty(0)
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    chunk = device_chunk_rows(rows, classes)
    lse = torch.empty(chunk, dtype=torch.float64, device=x.device)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        logits = half[part] @ weight_half.t()
        cuda._launch(
            "cross_entropy", x.device, cuda._CODES[dtype], logits, target[part], losses[part], None, lse, count,
            logits if keeps else None, *logits.shape, ignore_index, label_smoothing, 0.0,
        )  # fmt: skip
        if keeps:
            torch.mm(logits, weight_half, out=dx[part])
            dweight += logits.t() @ half[part]
    total = losses.sum(dtype=torch.float64)
    loss = (total if count is None else total / count).float()
    return loss, dx.to(x.dtype), dweight.to(weight.dtype)
