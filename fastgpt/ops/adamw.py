"""AdamW over all parameters in one call, and the norm of all gradients. Formulas in reference/.

They mutate their arguments and have no gradient; `fastgpt.train.optimizer.AdamW` is the optimizer made of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, define


def _check(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    for x in tensors:
        if x.dtype != dtype:
            raise NotCovered(f"dtype {x.dtype}; covered is {dtype}")
        if not x.is_contiguous():
            raise NotCovered("strides; covered are contiguous tensors")


def _cpu_norm(grads: list[Tensor]) -> Tensor:
    from fastgpt.ops import cpu

    _check(grads)
    norm = cpu.kernels.grad_norm([g.data_ptr() for g in grads], [g.numel() for g in grads], cpu.threads())
    return torch.tensor(norm, dtype=torch.float64)


def _cpu(
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
    shadows: list[Tensor],
    zero_grads: bool,
) -> None:
    from fastgpt.ops import cpu

    lists = (params, grads, exp_avgs, exp_avg_sqs)
    for tensors in lists:
        _check(tensors)
    _check(shadows, torch.bfloat16)
    p, g, m, v = ([x.data_ptr() for x in tensors] for tensors in lists)
    sizes = [x.numel() for x in params]
    cpu.kernels.adamw(
        p, g, m, v, [x.data_ptr() for x in shadows], sizes, weight_decays, lr, beta1, beta2, eps, grad_scale, step,
        zero_grads, cpu.threads(),
    )  # fmt: skip


_grad_norm = define(
    "grad_norm(Tensor[] grads) -> Tensor",
    fake=lambda grads: torch.empty((), dtype=torch.float64),
    reference=reference.grad_norm,
    cpu=_cpu_norm,
)
_adamw = define(
    "adamw(Tensor(a!)[] params, Tensor(d!)[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, float[] weight_decays, float lr,"
    " float beta1, float beta2, float eps, float grad_scale, int step, Tensor(e!)[] shadows,"
    " bool zero_grads) -> ()",
    fake=lambda *_: None,
    reference=reference.adamw,
    cpu=_cpu,
)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together; a float64 scalar on the CPU, summed in float64 over blocks in a fixed order.

    Raises:
        ValueError: an empty sequence.
    """
    if not grads:
        raise ValueError("grad_norm: grads is empty, expected at least one tensor")
    return _grad_norm(list(grads))


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    grad_scale: float = 1.0,
    shadows: Sequence[Tensor] = (),
    zero_grads: bool = False,
) -> None:
    """One AdamW update (arXiv 1711.05101, algorithm 2) of parameters and moments in place, in one pass over memory.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: as many tensors each, of equal shapes; any floating dtype, fastest in contiguous float32.
        step: this update's number, 1 for the first; it corrects the moments' bias.
        lr, betas, eps: as in torch.optim.AdamW.
        weight_decay: decoupled decay, one for all or one a parameter.
        grad_scale: multiplies every gradient first; clipping passes min(1, max_norm / norm).
        shadows: none, or a copy of every parameter in another dtype (fastest: contiguous bfloat16) that gets the new values, rounded:
            the weights that a half-type product reads, without a cast.
        zero_grads: set the gradients to zero after their use. The pass has them in the cache; a fill of their own costs as much as
            reading them twice.

    Raises:
        ValueError: lists of different lengths, tensors of different shapes, a step below 1.
    """
    decays = [float(weight_decay)] * len(params) if isinstance(weight_decay, (int, float)) else list(weight_decay)
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    if not params or any(len(tensors) != len(params) for tensors in (*lists, decays)):
        raise ValueError(
            f"adamw: got lists of {[len(tensors) for tensors in (*lists, decays)]}, expected one length above 0"
        )
    if shadows and len(shadows) != len(params):
        raise ValueError(f"adamw: shadows has length {len(shadows)}, expected 0 or that of params, {len(params)}")
    for tensors in zip(*lists, *([shadows] if shadows else []), strict=True):
        shape = tensors[0].shape
        if any(x.shape != shape for x in tensors):
            raise ValueError(f"adamw: shapes differ: {[tuple(x.shape) for x in tensors]}")
    if step < 1:
        raise ValueError(f"adamw: step is {step}, expected 1 or more")
    _adamw(*(list(tensors) for tensors in lists), decays, lr, *betas, eps, grad_scale, step, list(shadows), zero_grads)
    changed = [*params, *exp_avgs, *exp_avg_sqs, *shadows, *(grads if zero_grads else ())]
    torch.autograd.graph.increment_version(changed)
