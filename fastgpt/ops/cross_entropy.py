"""Cross-entropy of logits with integer targets, fused with the log-softmax. Formula in reference.py.

No class weights, no probabilities as targets, no spatial dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define

_REDUCTIONS = ("none", "mean", "sum")


def _cpu(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(logits)
    logits, target = logits.contiguous(), target.contiguous()
    rows, classes = logits.shape
    counted = cpu.kernels.count_targets(target.data_ptr(), rows, classes, ignore_index)
    losses = torch.empty(rows, dtype=torch.float32)
    lse = torch.empty_like(losses)
    cpu.kernels.cross_entropy(
        code, logits.data_ptr(), target.data_ptr(), losses.data_ptr(), lse.data_ptr(), rows, classes, ignore_index,
        label_smoothing, cpu.threads(),
    )  # fmt: skip
    if reduction == "none":
        return losses, lse
    total = losses.sum(dtype=torch.float64)
    return (total / counted if reduction == "mean" else total).float(), lse


def _cpu_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(logits)
    logits, target, grad = logits.contiguous(), target.contiguous(), grad.float().contiguous()
    rows, classes = logits.shape
    grad_scale = 1.0
    if reduction == "mean":
        counted = cpu.kernels.count_targets(target.data_ptr(), rows, classes, ignore_index)
        grad_scale = 1.0 / counted if counted else 0.0
    dlogits = torch.empty_like(logits)
    cpu.kernels.cross_entropy_backward(
        code, logits.data_ptr(), target.data_ptr(), lse.data_ptr(), grad.data_ptr(), 1 if reduction == "none" else 0, grad_scale,
        dlogits.data_ptr(), rows, classes, ignore_index, label_smoothing, cpu.threads(),
    )  # fmt: skip
    return dlogits


def _fake(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse = logits.new_empty(logits.shape[:1], dtype=wide)
    return (torch.empty_like(lse) if reduction == "none" else lse.new_empty(())), lse


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
    ) -> tuple[Tensor, Tensor]:
        loss, lse = below_autograd(_cross_entropy, logits, target, ignore_index, reduction, label_smoothing)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, lse)
        ctx.options = (ignore_index, reduction, label_smoothing)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        return _cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, str reduction, float label_smoothing) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.cross_entropy,
    cpu=_cpu,
    autograd=_Rule,
)
_cross_entropy_backward = define(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, int ignore_index, str reduction,"
    " float label_smoothing) -> Tensor",
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    reference=lambda *args: reference.cross_entropy_backward(*args).contiguous(),
    cpu=_cpu_backward,
)


def cross_entropy(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
) -> Tensor:
    """-log softmax(input)[target], computed in fp32 (fp64 for fp64).

    Args:
        input: logits, (N, C), or (C) with a scalar target; any floating dtype.
        target: (N) or (), int64 class numbers in [0, C), or `ignore_index`.
        ignore_index: targets of this value have loss and gradient 0 and do not count in the mean.
        reduction: "mean" over the targets that count, "sum", or "none".
        label_smoothing: this share of the target's weight is spread evenly over all classes (arXiv 1512.00567).

    Returns:
        A scalar, or (N) for "none"; float32 for half-type logits (torch rounds the loss to the logits' dtype).

    Raises:
        TypeError: logits that are not floating, targets that are not int64. ValueError: shapes or options that do not fit.
        IndexError: a target outside [0, C); on a GPU, where raising would wait for the kernel, that row's loss is NaN instead.
    """
    if not input.is_floating_point():
        raise TypeError(f"cross_entropy: input has dtype {input.dtype}, expected a floating-point dtype")
    if target.dtype != torch.int64:
        raise TypeError(f"cross_entropy: target has dtype {target.dtype}, expected torch.int64")
    if input.dim() not in (1, 2) or target.shape != input.shape[:-1]:
        raise ValueError(
            f"cross_entropy: input {tuple(input.shape)} and target {tuple(target.shape)}, expected (N, C) and (N), or (C) and ()"
        )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"cross_entropy: reduction is {reduction!r}, expected one of {_REDUCTIONS}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    if input.dim() == 1:
        input, target = input[None], target[None]
        loss = _cross_entropy(input, target, ignore_index, reduction, label_smoothing)[0]
        return loss[0] if reduction == "none" else loss
    loss = _cross_entropy(input, target, ignore_index, reduction, label_smoothing)[0]
    return loss
