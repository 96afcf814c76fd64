"""Subclasses that compute another library's modules with our ops.

A module is accelerated by giving it a class that derives from its own: weights, hooks, names in the state_dict, device and mode are
untouched, `isinstance` still holds, and giving the old class back undoes it. The classes of other libraries' modules are made here at
their first use, and again by name when a pickle asks for one (`__getattr__`).

Each `forward` looks at what it got and hands what the ops do not do to the class below.
"""

import functools
import importlib
import inspect
import types
from typing import Any

import torch
from torch import Tensor

from fastgpt import nn, ops
from fastgpt.compat.blocks import BlockPart, Conv1DPart, DropoutPart, GPT2BlockPart
from fastgpt.compat.loss import CausalLMPart, FusedGPTPart, GPTPart
from fastgpt.functional import scaled_dot_product_attention
from fastgpt.nn.fallback import is_small

# torch's class -> ours.
POINTWISE: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.GELU: nn.GELU,
    torch.nn.SiLU: nn.SiLU,
    torch.nn.Tanh: nn.Tanh,
    torch.nn.Sigmoid: nn.Sigmoid,
}


class UnlessSmallPart(torch.nn.Module):
    """A norm or activation of torch.nn: fastgpt.nn's of the same name, and torch's for few numbers, such as one token's."""

    ours: Any  # set by `derived`

    def forward(self, input: Tensor) -> Tensor:
        if is_small(input):
            small: Tensor = super().forward(input)
            return small
        y: Tensor = self.ours.forward(self, input)
        return y


class EmbeddingPart(torch.nn.Module):
    """torch.nn.Embedding, whose gradient is made by our op; the look-up alone is torch's, and so are its options."""

    weight: Tensor
    padding_idx: int | None
    max_norm: float | None
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        learns = weight.requires_grad and torch.is_grad_enabled()
        options = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if not learns or options or is_small(weight) or input.dtype not in (torch.int64, torch.int32):
            theirs: Tensor = super().forward(input)
            return theirs
        return ops.embedding(input, weight, self.padding_idx)


class RMSNormPart(torch.nn.Module):
    """Hugging Face's RMS norms (weight, variance_epsilon). The product with the weight is rounded once, where theirs rounds twice."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype or is_small(hidden_states, "rms_norm"):  # theirs promotes
            theirs: Tensor = super().forward(hidden_states)
            return theirs
        return ops.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class GatedMLPPart(torch.nn.Module):
    """Llama's MLP in Hugging Face: down_proj(silu(gate_proj(x)) * up_proj(x)); the projections are called as modules."""

    def forward(self, x: Tensor) -> Tensor:
        if is_small(x):
            small: Tensor = super().forward(x)
            return small
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
        y: Tensor = self.down_proj(ops.swiglu(gate, up))  # type: ignore[operator]
        return y


class GELUTanhPart(torch.nn.Module):
    """gelu in the tanh form, which GPT-2's code in Hugging Face, and minGPT's, write in eight operations."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate="tanh")  # torch's eight operations are slower for few numbers, too


class LayerNormPart(torch.nn.Module):
    """nanoGPT's LayerNorm, with an optional bias and eps = 1e-5."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if is_small(input):
            small: Tensor = super().forward(input)
            return small
        return ops.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttentionPart(torch.nn.Module):
    """nanoGPT's and minGPT's attention: one projection, the heads side by side."""

    c_attn: torch.nn.Module
    c_proj: torch.nn.Module
    resid_dropout: torch.nn.Module
    attn_dropout: torch.nn.Dropout
    n_head: int

    def forward(self, x: Tensor) -> Tensor:
        p = self.attn_dropout.p if self.training else 0.0
        if p and (not isinstance(self.attn_dropout, DropoutPart) or getattr(self, "dropout", p) != p):
            return super().forward(x)  # torch's masks are kept
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


_PARTS = {
    part.__name__: part
    for part in (
        UnlessSmallPart,
        RMSNormPart,
        GatedMLPPart,
        GELUTanhPart,
        LayerNormPart,
        CausalSelfAttentionPart,
        Conv1DPart,
        DropoutPart,
        GPT2BlockPart,
        BlockPart,
        CausalLMPart,
        EmbeddingPart,
        FusedGPTPart,
        GPTPart,
    )
}


def _as_named(forward: Any, base: type[torch.nn.Module]) -> Any:
    """A part's forward with the signature of the base's: transformers' Trainer keeps the columns that are arguments of it."""
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return copied


@functools.cache
def derived(part: type[torch.nn.Module], base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class that computes `base` by `part`; it keeps the base's name, and is found again by its qualified name."""
    where = f"{part.__name__}:{base.__module__}:{base.__qualname__}".replace(".", "/")
    content: dict[str, Any] = {"__module__": __name__, "__doc__": part.__doc__}
    if part in (CausalLMPart, GPT2BlockPart):
        content["forward"] = _as_named(part.forward, base)
    elif part is UnlessSmallPart:
        content["ours"] = POINTWISE[base]
    made = type(base.__name__, (part, base), content)
    made.__qualname__ = where
    return made


def __getattr__(name: str) -> Any:
    part, *base = name.split(":")
    if part not in _PARTS or len(base) != 2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = importlib.import_module(base[0].replace("/", "."))
    for step in base[1].split("/"):
        found = getattr(found, step)
    return derived(_PARTS[part], found)
