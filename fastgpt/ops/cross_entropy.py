"""Cross-entropy of logits with integer targets, fused with the log-softmax. Formula in reference/.

No class weights, no probabilities as targets, no spatial dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define, engine_of, implement

_REDUCTIONS = ("none", "mean", "sum")


def _cpu(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _cpu_forward(logits.contiguous(), target, ignore_index, reduction, label_smoothing, z_loss, 0)


def _cpu_forward(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    dlogits: int,
) -> tuple[Tensor, Tensor]:
    """The loss and the log-sum-exps; the gradient goes to the address `dlogits` unless that is 0."""
    from fastgpt.ops import cpu

    code = cpu.dtype_code(logits)
    target = target.contiguous()
    rows, classes = logits.shape
    loss = torch.empty(rows if reduction == "none" else (), dtype=torch.float32)
    lse = torch.empty(rows, dtype=torch.float64)
    cpu.kernels.cross_entropy(
        code, logits.data_ptr(), target.data_ptr(), _REDUCTIONS.index(reduction), loss.data_ptr(), lse.data_ptr(), dlogits, 1.0,
        rows, classes, ignore_index, label_smoothing, z_loss, cpu.threads(),
    )  # fmt: skip
    return loss, lse


def _cpu_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    from fastgpt.ops import cpu

    code = cpu.dtype_code(logits)
    logits, target, grad = logits.contiguous(), target.contiguous(), grad.float().contiguous()
    rows, classes = logits.shape
    dlogits = cpu.empty(logits.shape, logits.dtype)
    cpu.kernels.cross_entropy_backward(
        code, logits.data_ptr(), target.data_ptr(), lse.data_ptr(), grad.data_ptr(), _REDUCTIONS.index(reduction),
        dlogits.data_ptr(), rows, classes, ignore_index, label_smoothing, z_loss, cpu.threads(),
    )  # fmt: skip
    return dlogits


def _cpu_inplace(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor:
    if not logits.is_contiguous():
        raise NotCovered("logits that are not contiguous")
    options = (ignore_index, reduction, label_smoothing, z_loss)
    return _cpu_forward(logits, target, *options, logits.data_ptr())[0]


def _fake(logits: Tensor, target: Tensor, ignore_index: int, reduction: str, *_: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=wide)
    return loss, logits.new_empty(logits.shape[:1], dtype=torch.float64)


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        loss, lse = below_autograd(_cross_entropy, logits, target, ignore_index, reduction, label_smoothing, z_loss)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, lse)
        ctx.options = (ignore_index, reduction, label_smoothing, z_loss)
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None
        return _cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


class _InplaceRule(torch.autograd.Function):
    """The forward leaves the gradient in the logits' memory; the backward scales it, where the loss's own is not 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
        dlogits = logits.detach()
        loss: Tensor = below_autograd(_cross_entropy_inplace, dlogits, target, *options)
        torch.autograd.graph.increment_version(logits)  # an op that kept the logits for its backward raises there
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors  # raises in a second backward: the version is another by then
        _cross_entropy_inplace_backward(dlogits, grad)
        torch.autograd.graph.increment_version(dlogits)
        return dlogits, None, None, None, None, None


def _scale(dlogits: Tensor, grad: Tensor) -> None:
    dlogits.mul_(grad if grad.dim() == 0 else grad[:, None])


def _cpu_scale(dlogits: Tensor, grad: Tensor) -> None:
    if not bool((grad == 1.0).all()):
        _scale(dlogits, grad)


_cross_entropy = define(
    "cross_entropy(Tensor logits, Tensor target, int ignore_index, str reduction, float label_smoothing, float z_loss=0.0)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.cross_entropy,
    cpu=_cpu,
    autograd=_Rule,
)
_cross_entropy_backward = define(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor lse, int ignore_index, str reduction,"
    " float label_smoothing, float z_loss=0.0) -> Tensor",
    fake=lambda grad, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    reference=lambda *args: reference.cross_entropy_backward(*args).contiguous(),
    cpu=_cpu_backward,
)
_cross_entropy_inplace = define(
    "cross_entropy_inplace(Tensor(a!) logits, Tensor target, int ignore_index, str reduction, float label_smoothing,"
    " float z_loss) -> Tensor",
    fake=lambda *args: _fake(*args)[0],
    reference=reference.cross_entropy_inplace,
    cpu=_cpu_inplace,
)
_cross_entropy_inplace_backward = define(
    "cross_entropy_inplace_backward(Tensor(a!) dlogits, Tensor grad) -> ()",
    fake=lambda dlogits, grad: None,
    reference=_scale,
    cpu=_cpu_scale,
)
implement("cross_entropy_inplace_backward", "triton")(_scale)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace_backward: bool = False,
) -> Tensor:
    """-log softmax(input)[target], computed in fp32 (fp64 for fp64).

    Args:
        input: logits, (N, C), or (C) with a scalar target; any floating dtype.
        target: (N) or (), int64 class numbers in [0, C), or `ignore_index`.
        ignore_index: targets of this value have loss and gradient 0 and do not count in the mean.
        reduction: "mean" over the targets that count, "sum", or "none".
        label_smoothing: this share of the target's weight is spread evenly over all classes (arXiv 1512.00567).
        z_loss: adds z_loss * logsumexp(input)^2 to each row's loss, which keeps the logits near 0 (arXiv 2204.02311 uses 1e-4).
        inplace_backward: where a gradient will be asked for, the call itself replaces contiguous logits by their gradient, in the
            same pass as the loss, and no second matrix is made. The logits cannot be read afterwards; an op that kept them for its own
            backward, and a second backward, raise. A loss that is scaled later rounds half-type gradients once more. Without effect
            under torch.compile, without gradients, and on devices where no engine has a kernel for it.

    Returns:
        A scalar, or (N) for "none"; float32 for half-type logits (torch rounds the loss to the logits' dtype).

    Raises:
        TypeError: logits that are not floating, targets that are not int64. ValueError: shapes or options that do not fit.
        IndexError: a target outside [0, C); on a GPU, where raising would wait for the kernel, that row's loss is NaN instead.

    >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    tensor(1.3863)
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
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"cross_entropy: z_loss is {z_loss}, expected a finite number of at least 0")
    if input.dim() == 1:
        loss = _loss(input[None], target[None], ignore_index, reduction, label_smoothing, z_loss, inplace_backward)
        return loss[0] if reduction == "none" else loss
    return _loss(input, target, ignore_index, reduction, label_smoothing, z_loss, inplace_backward)


def _loss(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    inplace: bool,
) -> Tensor:
    options = (ignore_index, reduction, label_smoothing, z_loss)
    if inplace and input.requires_grad and torch.is_grad_enabled() and _may_replace(input):
        replaced: Tensor = _InplaceRule.apply(input, target, *options)
        return replaced
    loss: Tensor = _cross_entropy(input, target, *options)[0]
    return loss


def _may_replace(logits: Tensor) -> bool:
    if torch.compiler.is_compiling() or not logits.is_contiguous():
        return False
    device = logits.device.type
    return device == "cpu" or engine_of("cross_entropy_inplace", device)[0] == device
