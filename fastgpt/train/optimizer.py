"""AdamW with decoupled weight decay on matrices only, and gradient clipping, on `ops.adamw`.

Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101, algorithm 2. Parameters with two or more dimensions
(linear weights, embeddings) decay; biases and the gains of layer norms do not, because shrinking them changes what the network
computes without restraining it. Clipping scales the gradients inside the update, so their memory is read twice and never written.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops


def clip_scale(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm with so that it is at most `max_norm`; 1 where that is 0 (no clipping)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided over several (a DTensor); any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def update(optimizer: "AdamW", loss: float, learning_rate: float, grad_clip: float) -> bool:
    """One step with the gradients that are there, clipped, and none left; False where loss or gradient is not finite.

    Then nothing was updated.

    Args:
        optimizer: its parameters have their gradients.
        loss: what they are the gradients of.
        learning_rate: of this step.
        grad_clip: the largest norm, 0 for no clipping.
    """
    norm = optimizer.grad_norm()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step(grad_scale=clip_scale(norm, grad_clip))
    optimizer.zero_grad(set_to_none=True)
    return finite


class AdamW(torch.optim.Optimizer):
    """AdamW whose step is one call for all parameters of a group.

    Of parameters that are divided over processes (FSDP2), each process updates its part.

    Args:
        params: parameters or groups of them, as for every optimizer of torch.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.

    Example:
        >>> optimizer = AdamW(model.parameters(), lr=1e-3)  # doctest: +SKIP
        >>> loss.backward()  # doctest: +SKIP
        >>> optimizer.step(grad_scale=clip_scale(optimizer.grad_norm(), 1.0))  # doctest: +SKIP
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0})
        self.shadows: dict[Tensor, Tensor] = {}  # parameter -> its copy in bfloat16, if it has one

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return int(self.param_groups[0]["steps"])

    @steps.setter
    def steps(self, count: int) -> None:
        for group in self.param_groups:
            group["steps"] = count

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The first and second moment of a parameter, `exp_avg` and `exp_avg_sq`; zeros before the first step."""
        state = self.state[parameter]
        if not state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state

    def shadow(self, parameter: Tensor) -> Tensor:
        """A bfloat16 copy of a parameter, the same one at each call, that every later step writes in the update's own pass.

        Whatever else changes the parameter (loading one) must copy it over.
        """
        if parameter not in self.shadows:
            self.shadows[parameter] = parameter.detach().to(torch.bfloat16, memory_format=torch.contiguous_format)
        return self.shadows[parameter]

    def grad_norm(self) -> float:
        """The Euclidean norm of all gradients together, those of other processes included where they are divided."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        parts = [part for part in map(_local, gradients) if part.numel()]
        norm = ops.grad_norm(parts) if parts else torch.zeros((), dtype=torch.float64)
        if any(part is not gradient for part, gradient in zip(map(_local, gradients), gradients, strict=True)):
            squares = norm.double().square().to(gradients[0].device)
            torch.distributed.all_reduce(squares)
            norm = squares.sqrt()
        return norm.item()

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scale: float = 1.0, zero_grads: bool = False
    ) -> Any:
        """One update of every parameter that has a gradient, the gradients multiplied by `grad_scale`.

        `zero_grads` sets them to zero in the same pass, for backward passes that add to them. Where the next backward pass may write
        them anew, `zero_grad(set_to_none=True)` is cheaper.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (steps, rate, betas, eps, has_shadows), (params, decays) in self._calls().items():
            moments = [self.moments(p) for p in params]
            ops.adamw(
                [_local(p) for p in params],
                [_local(p.grad) for p in params if p.grad is not None],
                [_local(moment["exp_avg"]) for moment in moments],
                [_local(moment["exp_avg_sq"]) for moment in moments],
                step=steps,
                lr=rate,
                betas=betas,
                eps=eps,
                weight_decay=decays,
                grad_scale=grad_scale,
                shadows=[self.shadows[p] for p in params] if has_shadows else [],
                zero_grads=zero_grads,
            )
        return loss

    def _calls(self) -> dict[tuple[int, float, tuple[float, float], float, bool], tuple[list[Tensor], list[float]]]:
        """The parameters that have a gradient, and their decay, by all that one call of the op takes once: groups that differ in
        nothing else are updated together. Counts the step."""
        calls: dict[Any, tuple[list[Tensor], list[float]]] = {}
        for group in self.param_groups:
            group["steps"] += 1
            key = (group["steps"], group["lr"], tuple(group["betas"]), group["eps"])
            for p in group["params"]:
                if p.grad is not None and _local(p).numel():
                    params, decays = calls.setdefault((*key, bool(self.shadows) and p in self.shadows), ([], []))
                    params.append(p)
                    decays.append(group["weight_decay"])
        return calls


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW over the model's trainable parameters in two groups, with and without decay.

    A parameter used in two places (a tied head) appears once. Two kinds of state follow each parameter: `exp_avg` and `exp_avg_sq`.

    Args:
        model: the network; parameters with `requires_grad` False are left alone.
        learning_rate: rate of the first step; the training loop sets each step's own.
        weight_decay: coefficient for parameters of two or more dimensions.
        betas: decays of the first and second moment.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=learning_rate, betas=betas)
