"""Whole blocks of other libraries' GPTs in one op: Hugging Face's GPT2Block, nanoGPT's and minGPT's Block.

Each `forward` computes the block by `ops.transformer_block` where that does all that was asked for, one token behind a cache by fused
linear layers, and anything else (masks over a whole text, hooks, adapters, cross-attention, other devices) by the class below, whose
parts are accelerated one by one. What a block was found to hold is kept in `module._fastgpt_block` by `accelerate`; whether it still
holds is looked at on every call.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.compat.masks import is_causal_only
from fastgpt.nn.fallback import is_small, is_small_weight, log_fallback
from fastgpt.nn.linear import reads_few_rows
from fastgpt.ops.transformer_block import covers, transformer_block_with_qkv

NOTE = "_fastgpt_block"
_ELSEWHERE = object()
# What a block of GPT-2 may be given that changes nothing, or is looked at. Anything else goes to the block below: a later transformers
# may have a new argument, or a new name for one.
_CACHES = ("cache", "past_key_values", "past_key_value")  # transformers 5.24; 4.57 to 5.23; 4.53
_KNOWN = frozenset(
    (*_CACHES, "attention_mask", "encoder_attention_mask", "use_cache", "cache_position", "position_ids", "num_items_in_batch")
)  # fmt: skip


class BlockNote(NamedTuple):
    """What `accelerate` found out about a block."""

    activation: str
    eps: float
    takes: tuple[str, ...] = ()  # the names of forward's arguments behind the first
    in_tuple: bool = False  # forward returns (result,), as in transformers 4


def _has_hooks(module: torch.nn.Module) -> bool:
    """Hooks, or a `forward` of the instance's own, as other libraries set to move weights in and out."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def are_plain(linears: tuple[Any, ...], others: tuple[Any, ...], kind: str) -> bool:
    """Whether no adapter stands in a linear layer's place and no hook waits for a part's result."""
    return all(type(part).__name__ == kind for part in linears) and not any(
        _has_hooks(part) for part in (*linears, *others)
    )


def _weights(parts: Iterable[Any]) -> list[Any]:
    """Weight and bias of each part in turn; found among its parameters, or, where it keeps them elsewhere, by its attributes."""
    found: list[Any] = []
    for part in parts:
        own = part._parameters  # three times as fast as the attributes of a module
        for name in ("weight", "bias"):
            value = own.get(name, _ELSEWHERE)
            found.append(getattr(part, name) if value is _ELSEWHERE else value)
    return found


class DropoutPart(torch.nn.Module):
    """torch.nn.Dropout, whose masks our generator makes of a seed from torch's; few numbers stay torch's."""

    p: float

    def forward(self, input: Tensor) -> Tensor:
        if is_small(input):
            small: Tensor = super().forward(input)
            return small
        return ops.dropout(input, self.p, self.training)


def _probability(module: Any) -> float | None:
    """What a module drops in training; None where it is to be asked itself: torch's own masks are kept, or it is another's class."""
    if isinstance(module, torch.nn.Identity):
        return 0.0
    p: float | None = module.p if isinstance(module, torch.nn.Dropout) else None
    return p if (p == 0.0 or isinstance(module, DropoutPart)) and not _has_hooks(module) else None


def drops_of(block: Any, attn: Any, mlp_dropout: Any) -> tuple[float, float] | None:
    """The probabilities with which one op drops attention's weights and what both halves add; None where it cannot."""
    if not block.training:
        return 0.0, 0.0
    attention, first, second = map(_probability, (attn.attn_dropout, attn.resid_dropout, mlp_dropout))
    # nanoGPT's attention reads a number of its own.
    if attention is None or first is None or first != second or getattr(attn, "dropout", attention) != attention:
        return None
    return attention, first


class _KeptFromGraph(torch.autograd.Function):
    """Keys and values for a cache, made by an op that gives no gradients for them: asking for some is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, x: Tensor) -> Tensor:
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "fastgpt.accelerate: gradients through the cached keys and values of a training step are not computed;"
            " use fastgpt.restore(model) for a loss that reads past_key_values"
        )


class Conv1DPart(torch.nn.Module):
    """Hugging Face's Conv1D, a linear layer with an (in, out) weight, as `nn.Linear` is computed."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if reads_few_rows(x) and not is_small_weight(self.weight):
            return ops.linear(x, self.weight.t(), self.bias)
        y: Tensor = super().forward(x)
        return y


def scaling_of(attn: Any) -> float:
    """The factor of the scores of GPT-2's attention; transformers 4 has no attribute for it."""
    scaling: float | None = getattr(attn, "scaling", None)
    if scaling is None:
        scaling = float(attn.head_dim) ** -0.5 if attn.scale_attn_weights else 1.0
        scaling /= attn.layer_idx + 1 if attn.scale_attn_by_inverse_layer_idx else 1
    return scaling


def _layer(block: Any) -> int:
    number: int = block.attn.layer_idx
    return number


class GPT2BlockPart(torch.nn.Module):
    """Hugging Face's GPT2Block."""

    def _parts(self) -> tuple[Any, ...]:
        attn: Any = self.attn
        mlp: Any = self.mlp
        return self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj

    def _drops(self) -> tuple[float, float] | None:
        """The dropout of a block that one op computes, else None."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        ln_1, c_attn, c_proj, ln_2, c_fc, out = self._parts()
        if attn.config._attn_implementation != "fastgpt" or not are_plain(
            (c_attn, c_proj, c_fc, out), (ln_1, ln_2, attn, mlp, mlp.act), "Conv1D"
        ):
            return None
        return drops_of(self, attn, mlp.dropout)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        note: BlockNote = self.__dict__[NOTE]
        given = dict(zip(note.takes, args, strict=False)) | kwargs
        x, mask = hidden_states, given.get("attention_mask")
        cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
        beyond = [
            name for name, value in given.items() if name not in _KNOWN and value is not None and value is not False
        ]
        if beyond and not torch.compiler.is_compiling():
            log_fallback(f"a block of GPT-2 with {beyond[0]}")
        if (
            (cache is None or type(cache).__name__ == "DynamicCache")
            and not beyond
            and covers(x)
            and (drops := self._drops()) is not None
        ):
            y = None
            cached = 0 if cache is None else cache.get_seq_length(_layer(self))
            if cached == 0 and (mask is None or is_causal_only(mask, x.shape[1])):
                y = self._in_one_call(x, cache, drops)
            elif cache is not None and x.shape[1] == 1 and reads_few_rows(x) and not any(drops):
                y = self._one_token(x, cache, mask)
            if y is not None:
                return (y,) if note.in_tuple else y
        return super().forward(hidden_states, *args, **kwargs)

    def _in_one_call(self, x: Tensor, cache: Any, drops: tuple[float, float]) -> Tensor:
        params = [p.t() if p.dim() == 2 else p for p in _weights(self._parts())]
        note: BlockNote = self.__dict__[NOTE]
        attn: Any = self.attn
        y, qkv = transformer_block_with_qkv(
            x, params, n_head=attn.num_heads, activation=note.activation, eps=note.eps,
            attention_dropout=drops[0], dropout=drops[1],
        )  # fmt: skip
        if cache is not None:
            if y.requires_grad:
                qkv = _KeptFromGraph.apply(qkv, x)
            _, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
            cache.update(k.transpose(1, 2), v.transpose(1, 2), attn.layer_idx)
        return y

    def _one_token(self, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        ln_1, c_attn, c_proj, ln_2, c_fc, out = self._parts()
        attn: Any = self.attn
        B, _, C = x.shape
        y = ops.layer_norm(x, (C,), ln_1.weight, ln_1.bias, ln_1.eps)
        qkv = ops.linear(y, c_attn.weight.t(), c_attn.bias).view(B, 1, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, 1, D)
        k, v = cache.update(k, v, attn.layer_idx)
        ours = mask is None and not is_small(k, "cache")
        y = ops.attention(q, k, v) if ours else F.scaled_dot_product_attention(q, k, v, mask)
        x = ops.linear(y.transpose(1, 2).reshape(B, 1, C), c_proj.weight.t(), c_proj.bias, residual=x)
        y = ops.layer_norm(x, (C,), ln_2.weight, ln_2.bias, ln_2.eps)
        note: BlockNote = self.__dict__[NOTE]
        y = ops.linear(y, c_fc.weight.t(), c_fc.bias, activation=note.activation)
        return ops.linear(y, out.weight.t(), out.bias, residual=x)


class BlockPart(torch.nn.Module):
    """nanoGPT's and minGPT's Block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def _parts(self) -> tuple[Any, ...]:
        """Norms and linear layers in order, then the MLP's activation and its dropout."""
        attn: Any = self.attn
        mlp: Any = self.mlp
        if isinstance(mlp, torch.nn.ModuleDict):  # minGPT's
            rest = mlp["c_fc"], mlp["c_proj"], mlp["act"], mlp["dropout"]
        else:
            rest = mlp.c_fc, mlp.c_proj, getattr(mlp, "gelu", None) or mlp.act, mlp.dropout
        return self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, *rest

    def _drops(self, parts: tuple[Any, ...]) -> tuple[float, float] | None:
        """The dropout of a block that one op computes, else None."""
        ln_1, c_attn, c_proj, ln_2, c_fc, out, act, dropout = parts
        if not are_plain((c_attn, c_proj, c_fc, out), (ln_1, ln_2, self.attn, self.mlp, act), "Linear"):
            return None
        return drops_of(self, self.attn, dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = self._parts()
        drops = self._drops(parts) if covers(x) else None
        if drops is None:
            y: Tensor = super().forward(x)
            return y
        params = _weights(parts[:6])
        note: BlockNote = self.__dict__[NOTE]
        attn: Any = self.attn
        return ops.transformer_block(
            x, params, n_head=attn.n_head, activation=note.activation, eps=note.eps,
            attention_dropout=drops[0], dropout=drops[1],
        )  # fmt: skip


def activation_of(module: torch.nn.Module) -> str | None:
    """The name that ops.linear has for a module's function of one number; None where there is none."""
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    known = {
        "gelu": F.gelu(x),
        "gelu_tanh": F.gelu(x, approximate="tanh"),
        "relu": F.relu(x),
        "silu": F.silu(x),
        "tanh": x.tanh(),
    }
    with torch.no_grad():
        y = module(x)
    for name, want in known.items():
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y.double(), want, rtol=0, atol=1e-6):
            return name
    return None
