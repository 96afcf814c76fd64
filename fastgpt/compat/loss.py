"""The loss of other libraries' language models: transformers' ForCausalLMLoss on `ops.cross_entropy`, and, where it was asked for, head
and loss in one op (`ops.linear_cross_entropy`) in transformers' models and in nanoGPT's and minGPT's GPT."""

from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.compat import hf
from fastgpt.compat.adamw import AdamW
from fastgpt.compat.blocks import are_plain


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Position t's target is label t + 1; the last has none."""
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _per_item(loss: Tensor, items: Tensor | int | None) -> Tensor:
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, with its arguments; half logits are read as they are and summed in float32."""
    targets = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    reduction = "mean" if num_items_in_batch is None else "sum"
    rows = logits.view(-1, vocab_size)
    loss = ops.cross_entropy(
        rows, targets.reshape(-1).to(logits.device), ignore_index=ignore_index, reduction=reduction
    )
    return _per_item(loss, num_items_in_batch)


def is_causal_lm(module: Any) -> bool:
    """Whether this is a language model of transformers with the usual loss."""
    if not hasattr(type(module), "loss_function"):
        return False
    if not type(module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    usual = LOSS_MAPPING.get(getattr(module, "loss_type", None) or "ForCausalLM", ForCausalLMLoss) is ForCausalLMLoss
    return usual and getattr(module, "_loss_function", ForCausalLMLoss) in (ForCausalLMLoss, causal_lm_loss)


def makes_plain_logits(module: Any) -> bool:
    """Whether this is transformers' own class of a family whose logits are the head's product and nothing else: others scale or cap
    them, or add losses; a user's subclass has a `forward` of its own."""
    return type(module).__module__.startswith(tuple(f"transformers.models.{family}." for family in hf.FAMILIES))


def _head(module: Any) -> Tensor | None:
    """The head's weight where it is a plain product, without a bias, an adapter or a hook."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else module.lm_head
    if getattr(head, "bias", None) is not None or not are_plain((head,), (), "Linear"):
        return None
    weight: Tensor = head.weight
    return weight


class CausalLMPart(torch.nn.Module):
    """A language model of transformers whose training step makes no logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        weight = _head(self)
        if (
            not self.training
            or labels is None
            or weight is None
            or len(args) > 1
            or getattr(self, "_loss_function", causal_lm_loss) is not causal_lm_loss  # the user's, set later
            or any(name in kwargs for name in ("logits_to_keep", "ignore_index"))
            or False in (kwargs.get("return_dict"), getattr(self.config, "return_dict", None))
        ):
            return super().forward(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        rest = {name: value for name, value in kwargs.items() if name not in ("labels", "return_dict", "shift_labels")}
        items = rest.pop("num_items_in_batch", None)
        targets = kwargs.get("shift_labels")
        targets = _shifted(labels, -100) if targets is None else targets
        base: Any = self.base_model
        out = base(*args, **rest)
        x = out.last_hidden_state
        loss = ops.linear_cross_entropy(
            x.reshape(-1, x.shape[-1]),
            weight,
            targets.reshape(-1).to(x.device),
            reduction="mean" if items is None else "sum",
        )
        # The cache is called `cache` from transformers 5.24 on; what is None is no key.
        kept = ("cache", "past_key_values", "hidden_states", "attentions")
        return CausalLMOutputWithPast(
            loss=_per_item(loss, items), **{name: value for name, value in out.items() if name in kept}
        )


class GPTPart(torch.nn.Module):
    """nanoGPT's and minGPT's GPT, whose optimizer updates all parameters in one call on the CPU, too."""

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> Any:
        """The original's AdamW with its groups, in one call a step where it did not say how; update and state_dict are torch's."""
        theirs: Any = super().configure_optimizers(*args, **kwargs)  # type: ignore[misc]
        if type(theirs) is not torch.optim.AdamW or theirs.defaults["differentiable"]:
            return theirs
        if any(theirs.defaults[name] is not None for name in ("fused", "foreach")):
            return theirs
        groups = [{**group, "fused": True} for group in theirs.param_groups]
        if any(p.device.type != "cpu" or not p.is_floating_point() for group in groups for p in group["params"]):
            return theirs
        return AdamW(groups)  # every option stands in the groups


class FusedGPTPart(GPTPart):
    """nanoGPT's and minGPT's GPT, whose training step returns (None, loss)."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        weight = _head(self)
        if not self.training or targets is None or weight is None:
            return super().forward(idx, targets)
        return None, self.fused_loss(idx, targets, weight)

    def fused_loss(self, idx: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss of a step, with targets of -1 left out, as nanoGPT has it."""
        parts: Any = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        x = parts.drop(x)
        for block in parts.h:
            x = block(x)
        x = parts.ln_f(x)
        return ops.linear_cross_entropy(x.view(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index=-1)


def is_gpt(module: Any) -> bool:
    """Whether this has the parts of nanoGPT's GPT."""
    parts = getattr(module, "transformer", None)
    return (
        type(module).__name__ == "GPT"
        and isinstance(parts, torch.nn.ModuleDict)
        and all(name in parts for name in ("wte", "wpe", "drop", "h", "ln_f"))
        and isinstance(getattr(module, "lm_head", None), torch.nn.Linear)
    )


def same_loss(module: Any) -> bool:
    """Whether the original and FusedGPTPart make the same loss of random tokens, in evaluation mode."""
    weight, parts = _head(module), module.transformer
    if weight is None:
        return False
    modes = [(child, child.training) for child in module.modules()]
    size, device = min(8, parts.wpe.weight.shape[0]), weight.device
    idx = torch.randint(len(weight), (2, 1, size), generator=torch.Generator().manual_seed(0)).to(device)
    idx[1, :, -1] = -1
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            module.eval()
            want = module(idx[0], idx[1])[1]
            got = FusedGPTPart.fused_loss(module, idx[0], idx[1], weight)
        return bool(torch.allclose(want.double(), got.double(), rtol=1e-3))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    finally:
        for child, training in modes:
            child.training = training
