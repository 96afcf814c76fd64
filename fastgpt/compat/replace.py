"""accelerate(model) and restore(model): which module is computed by which of our classes, and the report.

Replaced are exact types only; a user's subclass has a `forward` of its own and is left alone. Modules that are recognised by their
parts (nanoGPT's and minGPT's) are first run on random numbers both ways, and left alone where the results differ.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import nn
from fastgpt.compat import blocks, hf, loss, parts
from fastgpt.nn.fallback import SMALLEST, is_small, whatever_size

_BEFORE = "_fastgpt_class"
_ATTENTION = "_fastgpt_attention"
_LOSS = "_fastgpt_loss"

# torch's class -> ours, beside parts.POINTWISE.
_TORCH: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.Linear: nn.Linear,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}
_LEFT = {
    torch.nn.ReLU: "ops.relu is no faster than torch's",
}
# What of our classes stays torch's in single calls; SMALLEST says what was measured.
_FEW = f"torch's on the CPU below {SMALLEST['pointwise']:,} numbers a call"
_TORCHS: dict[type[Any], str] = {
    parts.UnlessSmallPart: _FEW,
    parts.RMSNormPart: f"as before on the CPU below {SMALLEST['rms_norm']:,} numbers a call",
    parts.DropoutPart: f"masks of our generator; {_FEW}",
    parts.LayerNormPart: _FEW,
    parts.GatedMLPPart: _FEW,
    nn.Linear: "torch's but for up to 8 float32 rows without gradients on the CPU",
    parts.Conv1DPart: "as before but for up to 8 float32 rows without gradients on the CPU",
    nn.MultiheadAttention: f"torch's with masks, need_weights=True, and on the CPU below {SMALLEST['layer']:,} numbers a call",
    nn.TransformerEncoderLayer: f"torch's with masks, and on the CPU below {SMALLEST['layer']:,} numbers a call",
    parts.BlockPart: "part by part on a GPU and with hooks",
    parts.GPT2BlockPart: "part by part on a GPU, with a mask over a whole text, a head mask, cross-attention or hooks",
    parts.CausalLMPart: "as before in evaluation mode and without labels",
    parts.FusedGPTPart: "its optimizer fused, head and loss in one op in training",
    parts.GPTPart: "its optimizer fused, the rest as before",
    parts.EmbeddingPart: "its gradient; the look-up is torch's",
}
_DROPPING = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)
_PRODUCTS = ("Linear", "Conv1D")
_HF_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_HF_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


@dataclasses.dataclass
class Report:
    """What `accelerate` did.

    Attributes:
        replaced: a class -> how many modules of it are ours now.
        partly: a replaced class -> which calls of it are computed as before, because that is faster or the op does not do it.
        left: a class -> why it, or some modules of it, were not replaced.
    """

    replaced: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    partly: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def count(self, name: str, faster: type[torch.nn.Module] | None = None) -> None:
        """One more module of the class `name` is computed by `faster`."""
        self.replaced[name] += 1
        for kind in faster.__mro__ if faster is not None else ():
            if kind in _TORCHS:
                self.partly[name] = _TORCHS[kind]
                break

    def __str__(self) -> str:
        lines = []
        for name, count in self.replaced.items():
            partly = f" ({self.partly[name]})" if name in self.partly else ""
            lines.append(f"replaced {count} x {name}{partly}")
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing that fastgpt knows"


def _same(module: torch.nn.Module, faster: type[torch.nn.Module], *x: torch.Tensor) -> bool:
    """Whether both classes make the same of x, in evaluation mode; the module is as before afterwards."""
    mode, slower = module.training, type(module)
    modes = [(child, child.training) for child in module.modules()]
    try:
        # Under the caller's autocast both would round to half, and differ by that.
        with torch.no_grad(), torch.autocast(x[0].device.type, enabled=False), whatever_size():
            module.eval()
            want = module.forward(*x)
            module.__class__ = faster
            got = module.forward(*x)
            tolerance = 1e-4 if x[0].dtype in (torch.float32, torch.float64) else 3e-2
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


def _dropout_of(module: Any) -> bool:
    return any(part.dropout for part in module.modules() if isinstance(part, torch.nn.MultiheadAttention))


def _weight(module: Any) -> torch.Tensor:
    weight: torch.Tensor = module.weight
    return weight


def _by_parts(module: Any, report: Report) -> type[torch.nn.Module] | None:
    """Our class for a module that is recognised by its name and parts."""
    kind: Any = type(module)
    checked: list[tuple[type[torch.nn.Module], Callable[[], torch.Tensor]]] = []
    weight = getattr(module, "weight", None)
    if kind is torch.nn.Dropout:
        return parts.derived(parts.DropoutPart, kind)
    if kind is torch.nn.Embedding:
        return parts.derived(parts.EmbeddingPart, kind)
    if kind in parts.POINTWISE:
        return parts.derived(parts.UnlessSmallPart, kind)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return parts.derived(parts.Conv1DPart, kind)
    if kind.__name__ == "GPT2Block" and kind.__module__.startswith("transformers."):
        return _gpt2_block(module, report)
    if kind.__name__ == "Block" and all(hasattr(module, name) for name in ("ln_1", "attn", "ln_2", "mlp")):
        return _block(module, report)
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
        checked.append(
            (parts.derived(parts.LayerNormPart, kind), lambda: _probe(weight, 3, *weight.shape) / 100)
        )  # numbers so small that eps counts
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


def _note(module: Any, act: torch.nn.Module, report: Report) -> bool:
    """Keeps what a block holds; False where one op does not stand for all of it."""
    name = type(module).__name__
    activation = blocks.activation_of(act)
    if activation is None:
        report.left[name] = f"its activation is {type(act).__name__}; its parts are replaced one by one"
        return False
    eps = {getattr(norm, "eps", 1e-5) for norm in (module.ln_1, module.ln_2)}
    if len(eps) > 1:
        report.left[name] = "its norms differ in eps; its parts are replaced one by one"
        return False
    module.__dict__[blocks.NOTE] = blocks.BlockNote(activation, eps.pop())
    return True


def _gpt2_block(module: Any, report: Report) -> type[torch.nn.Module] | None:
    """Our class for a block of Hugging Face's GPT-2 that is as GPT-2's are."""
    kind: Any = type(module)
    attn = module.attn
    takes = tuple(inspect.signature(kind.forward).parameters)[2:]
    what = None
    if attn.config.reorder_and_upcast_attn:
        what = "its attention is in float32 whatever the model's dtype"
    elif hasattr(module, "crossattention") or attn.is_cross_attention:
        what = "it attends to an encoder"
    elif blocks.scaling_of(attn) != attn.head_dim**-0.5:
        what = "its scores are scaled by other than 1 / sqrt(D)"
    if what is not None:
        report.left["GPT2Block"] = f"{what}; its parts are replaced one by one"
        return None
    if not _note(module, module.mlp.act, report):
        return None
    note = module.__dict__[blocks.NOTE]
    module.__dict__[blocks.NOTE] = note._replace(takes=takes, in_tuple="output_attentions" in takes)
    return parts.derived(parts.GPT2BlockPart, kind)


def _block(module: Any, report: Report) -> type[torch.nn.Module] | None:
    """Our class for nanoGPT's or minGPT's block, where it computes the same of random numbers."""
    kind: Any = type(module)
    try:
        mlp, attn, weight = module.mlp, module.attn, module.attn.c_proj.weight
        act = mlp["act"] if isinstance(mlp, torch.nn.ModuleDict) else getattr(mlp, "gelu", None) or mlp.act
        _ = attn.attn_dropout.p, attn.resid_dropout.p, attn.n_head, attn.c_attn
        if not _note(module, act, report):
            return None
        faster = parts.derived(parts.BlockPart, kind)
        if _same(module, faster, _probe(weight, 1, 4, len(weight)) / 100):
            return faster
    except (AttributeError, KeyError):
        pass
    module.__dict__.pop(blocks.NOTE, None)
    report.left[type(module).__name__] = "not nanoGPT's or minGPT's, or its results are others; its parts are looked at"
    return None


def _set_loss(model: torch.nn.Module, report: Report, fused: bool) -> None:
    """transformers' loss of a language model on `ops.cross_entropy`; where `fused`, head and loss in one op, for nanoGPT's GPT too."""
    for module in model.modules():
        kind: Any = type(module)
        if loss.is_causal_lm(module):
            if "_loss_function" not in module.__dict__:
                module.__dict__[_LOSS] = True
                module.__dict__["_loss_function"] = loss.causal_lm_loss
                report.replaced[f"loss of {kind.__name__}"] += 1
            if not fused or _BEFORE in module.__dict__:
                continue
            if not loss.makes_plain_logits(module):
                report.left[f"fused loss of {kind.__name__}"] = "not a family that is covered"
                continue
            module.__dict__[_BEFORE] = kind
            module.__class__ = parts.derived(parts.CausalLMPart, kind)
            report.count(kind.__name__, type(module))
        elif loss.is_gpt(module) and _BEFORE not in module.__dict__:
            part: Any = parts.GPTPart
            if fused and loss.same_loss(module):
                part = parts.FusedGPTPart
            elif fused:
                report.left[f"loss of {kind.__name__}"] = "it is another"
            module.__dict__[_BEFORE] = kind
            module.__class__ = parts.derived(part, kind)
            report.count(kind.__name__, part)


def accelerate(model: torch.nn.Module, *, fused_loss: bool = False, keep_dropout: bool = False) -> Report:
    """Replaces in place the parts of a model that our ops compute faster; weights, hooks, state_dict, device and mode stay.

    Args:
        model: any model of torch.nn parts, nanoGPT's or minGPT's GPT, or one of transformers (GPT-2, GPT-NeoX, Llama, Mistral, Qwen2,
            Qwen3), whose attention is set to "fastgpt" too.
        fused_loss: of transformers' models and nanoGPT's GPT, compute the head and the loss of a training step in one op that never has
            the whole matrix of logits. `logits` is then None in training mode where labels are given; ask for them with an explicit
            `logits_to_keep=0` (transformers), in evaluation mode, or without labels.
        keep_dropout: leave dropout in training to torch, so that a seed gives the masks it gave before: for comparing losses. Else
            masks are ours, drawn from torch's default generator; torch's cost the CPU more than the products around them.

    Returns:
        A Report. What is not known is left as it is. Calling it again changes nothing more.

    Raises:
        TypeError: model is no torch.nn.Module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.CrossEntropyLoss())
        >>> print(accelerate(model))
        replaced 1 x LayerNorm (torch's on the CPU below 16,384 numbers a call)
        replaced 1 x CrossEntropyLoss
        left Linear: torch's is faster where the weight has less than 524,288 numbers
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: a torch.nn.Module")
    report = Report()
    for module in model.modules():
        kind = type(module)
        if _BEFORE in module.__dict__ or kind in _TORCH.values():
            continue
        drops = kind is torch.nn.Dropout or (kind in _DROPPING and _dropout_of(module))
        if keep_dropout and drops:
            report.left[kind.__name__] = (
                "its masks are to be torch's; blocks and attention with dropout are as before in training"
            )
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
        if kind.__name__ in _PRODUCTS and is_small(_weight(module), "weight"):
            report.left[kind.__name__] = (
                f"torch's is faster where the weight has less than {SMALLEST['weight']:,} numbers"
            )
            continue
        module.__dict__[_BEFORE] = kind
        module.__class__ = faster
        report.count(kind.__name__, faster)
    _set_attention(model, report)
    _set_loss(model, report, fused_loss)
    return report


def _set_attention(model: torch.nn.Module, report: Report) -> None:
    """attn_implementation="fastgpt" for every model of transformers inside."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        before = getattr(config, "_attn_implementation", None)
        if before is None or not hasattr(module, "_supports_sdpa") or before == "fastgpt":
            continue
        if config.model_type not in hf.FAMILIES:
            report.left[f"attention of {config.model_type}"] = "not a family that is covered"
        elif before != "sdpa":
            report.left[f"attention of {config.model_type}"] = f"attn_implementation is {before!r}, chosen by the user"
        elif not hf.is_supported():
            report.left[f"attention of {config.model_type}"] = "transformers 4.53 or later is needed"
        else:
            hf.register()
            module.__dict__[_ATTENTION] = hf.Before(before)
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
        kind = type(module)
        # A class that was made from ours since, by torch's parametrizations or FSDP, stays: without it the weights are not there.
        if _BEFORE in module.__dict__ and (kind in _TORCH.values() or kind.__module__ == parts.__name__):
            module.__class__ = module.__dict__.pop(_BEFORE)
            module.__dict__.pop(blocks.NOTE, None)
            count += 1
        if module.__dict__.pop(_LOSS, None) and module.__dict__.get("_loss_function") is loss.causal_lm_loss:
            del module.__dict__["_loss_function"]
        attention = module.__dict__.pop(_ATTENTION, None)
        if attention is not None:
            module.config._attn_implementation = str(attention)  # type: ignore[union-attr]
    return count
