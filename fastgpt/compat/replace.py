"""accelerate(model) and restore(model): which module is computed by which of our classes, and the report.

Replaced are exact types only; a user's subclass has a `forward` of its own and is left alone. Modules that are recognised by their
parts (nanoGPT's and minGPT's) are first run on random numbers both ways, and left alone where the results differ.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import nn
from fastgpt.compat import parts

_BEFORE = "_fastgpt_class"
_ATTENTION = "_fastgpt_attention"

# torch's class -> ours. The activations' and norms' own classes; nn.Linear and nn.Embedding are torch's products and look-ups already.
_TORCH: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.SiLU: nn.SiLU,
    torch.nn.Tanh: nn.Tanh,
    torch.nn.Sigmoid: nn.Sigmoid,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
}
_LEFT = {
    torch.nn.ReLU: "ops.relu is no faster than torch's",
    torch.nn.Linear: "the product stays torch's",
    torch.nn.MultiheadAttention: "not covered",
    torch.nn.TransformerEncoderLayer: "not covered; its norms are replaced",
}
_HF_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
_HF_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP")
_HF_FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")


@dataclasses.dataclass
class Report:
    """What `accelerate` did: `replaced` maps a class to how many modules of it are ours now, `left` a class to why it was not."""

    replaced: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {count} x {name}" for name, count in self.replaced.items()]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing that fastgpt knows"


def _same(module: torch.nn.Module, faster: type[torch.nn.Module], x: torch.Tensor) -> bool:
    """Whether both classes make the same of x, in evaluation mode; the module is as before afterwards."""
    mode, slower = module.training, type(module)
    modes = [(child, child.training) for child in module.modules()]
    try:
        # Under the caller's autocast both would round to half, and differ by that.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            module.eval()
            want = module.forward(x)
            module.__class__ = faster
            got = module.forward(x)
            tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
            return isinstance(want, torch.Tensor) and torch.allclose(got, want, rtol=tolerance, atol=tolerance)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    finally:
        module.__class__ = slower
        module.training = mode
        for child, training in modes:
            child.training = training


def _probe(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def _by_parts(module: Any, report: Report) -> type[torch.nn.Module] | None:
    """Our class for a module that is recognised by its name and parts."""
    kind: Any = type(module)
    checked: list[tuple[type[torch.nn.Module], Callable[[], torch.Tensor]]] = []
    weight = getattr(module, "weight", None)
    if kind.__name__ in _HF_NORMS and hasattr(module, "variance_epsilon"):
        return parts.derived(parts.RMSNormPart, kind)
    if kind.__name__ in _HF_MLPS and hasattr(module, "gate_proj"):
        act = type(getattr(module, "act_fn", None))
        if act.__name__ in ("SiLU", "SiLUActivation"):
            return parts.derived(parts.GatedMLPPart, kind)
        report.left[kind.__name__] = f"its activation is {act.__name__}"
        return None
    if kind.__name__ in ("NewGELUActivation", "NewGELU", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation"):
        x = torch.linspace(-4, 4, 33)
        checked.append((parts.derived(parts.GELUTanhPart, kind), lambda: x))
    elif kind.__name__ == "LayerNorm" and kind not in (torch.nn.LayerNorm, nn.LayerNorm) and weight is not None:
        checked.append((parts.derived(parts.LayerNormPart, kind), lambda: _probe(weight, 3, *weight.shape)))
    elif kind.__name__ == "CausalSelfAttention" and kind is not nn.CausalSelfAttention:
        needed = ("c_attn", "c_proj", "attn_dropout", "resid_dropout", "n_head")
        if all(hasattr(module, name) for name in needed):
            projection = module.c_proj.weight
            checked.append(
                (parts.derived(parts.CausalSelfAttentionPart, kind), lambda: _probe(projection, 1, 4, len(projection)))
            )
    for faster, make in checked:
        if _same(module, faster, make()):
            return faster
        report.left[kind.__name__] = "its results are others"
    return None


def accelerate(model: torch.nn.Module) -> Report:
    """Replaces in place the parts of a model that our ops compute faster; weights, hooks, state_dict, device and mode stay.

    Args:
        model: any model of torch.nn parts, nanoGPT's or minGPT's GPT, or one of transformers (GPT-2, GPT-NeoX, Llama, Mistral, Qwen2),
            whose attention is set to "fastgpt" too.

    Returns:
        A Report. What is not known is left as it is. Calling it again changes nothing more.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.GELU())
        >>> print(accelerate(model))
        replaced 1 x LayerNorm
        replaced 1 x GELU
        left Linear: the product stays torch's
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    report = Report()
    for module in model.modules():
        kind = type(module)
        if _BEFORE in module.__dict__ or kind in _TORCH.values():
            continue
        if kind in _LEFT:
            report.left[kind.__name__] = _LEFT[kind]
            continue
        faster = _TORCH.get(kind) or _by_parts(module, report)
        if faster is None:
            continue
        if getattr(module, "inplace", False):
            report.left[kind.__name__] = "inplace=True"
            continue
        module.__dict__[_BEFORE] = kind
        module.__class__ = faster
        report.replaced[kind.__name__] += 1
    _set_attention(model, report)
    return report


def _set_attention(model: torch.nn.Module, report: Report) -> None:
    """attn_implementation="fastgpt" for every model of transformers inside."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        before = getattr(config, "_attn_implementation", None)
        if before is None or not hasattr(module, "set_attn_implementation") or before == "fastgpt":
            continue
        if config.model_type not in _HF_FAMILIES:
            report.left[f"attention of {config.model_type}"] = "not a family that is covered"
        elif before != "sdpa":
            report.left[f"attention of {config.model_type}"] = f"attn_implementation is {before!r}, chosen by the user"
        else:
            from fastgpt.compat import hf

            hf.register()
            module.__dict__[_ATTENTION] = before
            config._attn_implementation = hf.NAME
            report.replaced[f"attention of {config.model_type}"] += 1


def restore(model: torch.nn.Module) -> int:
    """Undoes `accelerate`; deep copies and unpickled models too. Returns how many modules have their own class again.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.GELU())
        >>> report = accelerate(model)
        >>> restore(model), type(model[0]) is torch.nn.GELU
        (1, True)
    """
    count = 0
    for module in model.modules():
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None:
            module.__class__ = before
            count += 1
        attention = module.__dict__.pop(_ATTENTION, None)
        if attention is not None:
            module.config._attn_implementation = attention  # type: ignore[union-attr]
    return count
