"""Cross-entropy, with label smoothing as in arXiv 1512.00567 (section 7)."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss (a scalar, or (N) for reduction "none") and each row's log-sum-exp (0 where the target is ignored).

    The log-sum-exp is float64: its rounding to float32 would be the gradient's largest error.
    """
    v = wide(logits)
    counted = target != ignore_index
    safe = torch.where(counted, target, 0)
    if bool(((safe < 0) | (safe >= v.shape[-1])).any()):
        raise IndexError(f"target: expected 0 to {v.shape[-1] - 1} or ignore_index ({ignore_index}), got one outside")
    exact = _log_sum_exp(v)
    lse = exact.to(v.dtype)
    losses = (1 - label_smoothing) * (lse - v.gather(-1, safe[:, None])[:, 0])
    if label_smoothing > 0:
        losses = losses + label_smoothing * (lse - v.mean(-1))
    if z_loss > 0:
        losses = losses + z_loss * lse**2
    losses = torch.where(counted, losses, 0.0)
    exact = torch.where(counted, exact, 0.0)
    if reduction == "none":
        return losses, exact
    total = losses.sum()
    return (total if reduction == "sum" else total / counted.sum()), exact


def _log_sum_exp(v: Tensor) -> Tensor:
    """Of each row, with the sum's logarithm and what is added to it in float64."""
    top = v.detach().amax(-1)
    top = torch.where(top.isfinite(), top, 0.0)
    return top.double() + torch.exp(v - top[:, None]).sum(-1).double().log()


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    v = wide(logits)
    counted = target != ignore_index
    g = grad.to(v.dtype) / counted.sum() if reduction == "mean" else grad.to(v.dtype)
    near = lse.to(v.dtype)
    rest = torch.where(near.isfinite(), lse - near, 0.0).to(v.dtype)
    factor = (1 + 2 * z_loss * near) * (1 - rest)
    p = torch.exp(v - near[:, None]) * factor[:, None] - label_smoothing / v.shape[-1]
    safe = torch.where(counted, target, 0)
    p.scatter_add_(-1, safe[:, None], torch.full_like(p[:, :1], label_smoothing - 1))
    return (torch.where(counted[:, None], p, 0.0) * g[..., None]).to(logits.dtype)


def cross_entropy_inplace(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor:
    """The loss; the logits are replaced by their gradient (of the losses' sum for reduction "none")."""
    options = (ignore_index, reduction, label_smoothing, z_loss)
    loss, lse = cross_entropy(logits, target, *options)
    logits.copy_(cross_entropy_backward(torch.ones_like(loss), logits, target, lse, *options))
    return loss
