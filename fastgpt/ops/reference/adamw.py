"""AdamW, arXiv 1711.05101, algorithm 2, and the norm of all gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, a float64 scalar on the CPU."""
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().cpu()


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    weight_decays: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
    step: int,
    shadows: Sequence[Tensor] = (),
    zero_grads: bool = False,
) -> None:
    """One update of all parameters and both moments in place; `step` is 1 for the first."""
    for p, grad, m, v, decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays, strict=True):
        g = grad * grad_scale
        p.mul_(1 - lr * decay)
        m.add_((g - m) * (1 - beta1))
        v.mul_(beta2).add_((1 - beta2) * g * g)
        p.sub_(lr / (1 - beta1**step) * m / (v.sqrt() / math.sqrt(1 - beta2**step) + eps))
    for shadow, p in zip(shadows, params, strict=False):
        shadow.copy_(p)
    if zero_grads:
        for grad in grads:
            grad.zero_()
