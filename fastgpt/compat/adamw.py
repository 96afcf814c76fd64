"""torch.optim.AdamW whose step on the CPU is one call of `ops.adamw` for all parameters: the same update, options and state_dict.

torch's fused step walks over the parameters twice in Python and starts a kernel for each: 0.75 ms of a step of nanoGPT's run on a CPU,
0.3 here. What the op does not do (amsgrad, maximize, a closure, other dtypes and devices, the first step, which makes the state) goes
to torch's own step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops

_STATE = ("step", "exp_avg", "exp_avg_sq")
_BEYOND = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")  # options that are torch's alone


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that calls hooks, which torch puts around it when the first instance is made."""
    inner: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return inner


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided and x.is_contiguous()


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose steps on float32 parameters on the CPU are one call."""

    def step(self, closure: Any = None) -> Any:
        """One update, as torch.optim.AdamW makes it."""
        calls = None if closure is not None else self._calls()
        if calls is None:
            return _unhooked(torch.optim.AdamW.step)(self, closure)
        for (step, rate, betas, eps), (params, states, decays) in calls.items():
            moments = [[state[name] for state in states] for name in _STATE]
            ops.adamw(
                params,
                [p.grad for p in params if p.grad is not None],
                *moments[1:],
                step=int(step) + 1,
                lr=rate,
                betas=betas,
                eps=eps,
                weight_decay=decays,
            )
            torch._foreach_add_(moments[0], 1)
        return None

    def _calls(self) -> dict[Any, tuple[list[Tensor], list[dict[str, Tensor]], list[float]]] | None:
        """Parameters with a gradient, their states and decays by what one call takes once; None where torch's step is to be asked."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return None
        calls: dict[Any, tuple[list[Tensor], list[dict[str, Tensor]], list[float]]] = {}
        for group in self.param_groups:
            rates = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            if any(group[name] for name in _BEYOND) or any(isinstance(rate, Tensor) for rate in rates):
                return None
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.get(p)
                if not state or not all(_is_plain(x) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])):
                    return None
                key = (state["step"].item(), group["lr"], tuple(group["betas"]), group["eps"])
                params, states, decays = calls.setdefault(key, ([], [], []))
                params.append(p)
                states.append(state)
                decays.append(group["weight_decay"])
        return calls
