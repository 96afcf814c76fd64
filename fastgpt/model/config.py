"""GPTConfig: everything that decides a GPT's shape, arithmetic and starting weights, checked when it is made.

A configuration that exists is valid: every field is checked by type and range, and one that does not fit raises
UserError (a ValueError) that names the field, what it got and what it takes. How a model is trained stands elsewhere.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fastgpt.errors import UserError
from fastgpt.model.init import INIT_SCHEMES
from fastgpt.nn import ACTIVATIONS, GATED_ACTIVATIONS
from fastgpt.nn.mlp import hidden_width


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" for the accepted name closest to `name`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(accepted), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "rope")

# Keys of rope_scaling, by its type. "linear": arXiv:2306.15595. "llama3": Llama 3.1, which divides slow frequencies by factor, leaves
# fast ones and goes from one to the other in between.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_block_size"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape, arithmetic and starting weights of a GPT. The defaults are GPT-2's.

    Attributes:
        vocab_size: rows of the token embedding and width of the logits, V; at least the tokenizer's n_vocab.
        block_size: the longest context in tokens; rows of the position embedding or of the rotary tables.
        n_layer: blocks.
        n_head: query heads; divides n_embd.
        n_kv_head: heads of keys and values, shared between query heads; divides n_head. None: n_head.
        n_embd: width of the residual stream, C.
        n_hidden: width inside the MLP. None: 4 n_embd, or with a gated activation 8/3 n_embd rounded up to a multiple of 64.
        dropout: probability on the embeddings and on both outputs of every block, in [0, 1); never on attention
            probabilities.
        bias: whether the linear layers and the layer norms of the blocks have one (the final norm too). An RMS norm never does.
        qkv_bias, mlp_bias, norm_bias: the same for one kind of layer alone; None: as `bias`.
        activation: relu, sigmoid, tanh, gelu (erf form), gelu_tanh (GPT-2's) or silu; gated: swiglu, geglu, geglu_tanh.
        norm: layer_norm or rms_norm.
        norm_eps: added to the norms' variance or mean square.
        position: learned, an embedding added to the tokens', or rope, a turn of queries and keys in every block.
        rope_theta: base of the turn's geometric series of angles.
        rope_scaling: how turns are slowed down for longer texts. None: they are not; or a dict with "type" "linear" and "factor",
            or with "type" "llama3", "factor", "low_freq_factor", "high_freq_factor" and "original_block_size".
        tied_head: whether the head is the token embedding; else it has a weight of its own.
        init: gpt2, normal, zeros, xavier or he; see fastgpt.model.init.

    Raises:
        UserError: a field of the wrong type or out of its range; a ValueError.

    Example:
        >>> GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128).head_dim
        32

        Llama's kind (SmolLM2-135M):
        >>> llama = {"norm": "rms_norm", "position": "rope", "activation": "swiglu", "bias": False}
        >>> shape = {"vocab_size": 49152, "block_size": 8192, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576}
        >>> GPTConfig(**shape, **llama, rope_theta=1e5).hidden
        1536
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_kv_head: int | None = None
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    activation: str = "gelu_tanh"
    init: str = "gpt2"
    n_hidden: int | None = None
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden"):
            value = getattr(self, name)
            if name in ("n_kv_head", "n_hidden") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: got {value!r}; accepted: a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head: got {self.n_head}; n_embd = {self.n_embd} must be a multiple of it")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_kv_head: got {self.n_kv_head}; n_head = {self.n_head} must be a multiple of it")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout!r}; accepted: a number from 0 up to but not including 1")
        for name in ("bias", "tied_head", "qkv_bias", "mlp_bias", "norm_bias"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name not in ("bias", "tied_head") and value is None):
                raise UserError(f"{name}: got {value!r}; accepted: true or false")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"{name}: got {value!r}; accepted: a number above 0")
        for name, accepted in (
            ("activation", (*ACTIVATIONS, *GATED_ACTIVATIONS)),
            ("init", INIT_SCHEMES),
            ("norm", NORMS),
            ("position", POSITIONS),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise UserError(
                    f"{name}: got {value!r}; accepted: {', '.join(accepted)}{nearest(str(value), accepted)}"
                )
        if self.norm == "rms_norm" and self.norm_bias:
            raise UserError("norm_bias: got True; an rms_norm has no bias")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"n_head: got {self.n_head}; rope turns pairs, and n_embd / n_head = {self.head_dim} is odd"
            )
        self._check_rope_scaling()

    def _check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is None:
            return
        if self.position != "rope":
            raise UserError(f"rope_scaling: got {scaling!r} with position = {self.position!r}; it needs rope")
        kind = scaling.get("type") if isinstance(scaling, Mapping) else None
        if kind not in ROPE_SCALINGS:
            raise UserError(f"rope_scaling: got {scaling!r}; accepted: none, or a type of {', '.join(ROPE_SCALINGS)}")
        wanted = {"type", *ROPE_SCALINGS[kind]}
        if set(scaling) != wanted:
            raise UserError(f"rope_scaling: got the keys {sorted(scaling)}; type {kind!r} takes {sorted(wanted)}")
        for name in ROPE_SCALINGS[kind]:
            value = scaling[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"rope_scaling: {name} is {value!r}; accepted: a number above 0")
        if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise UserError(f"rope_scaling: got {dict(scaling)}; low_freq_factor must be below high_freq_factor")

    def has_bias(self, kind: str) -> bool:
        """Whether the layers of a kind, "qkv", "mlp" or "norm", have a bias; `bias` says so for attention's output projection."""
        if kind == "norm" and self.norm == "rms_norm":
            return False
        own: bool | None = getattr(self, f"{kind}_bias")
        return self.bias if own is None else own

    @property
    def hidden(self) -> int:
        """Width inside the MLP, with the None of n_hidden resolved."""
        return hidden_width(self.n_embd, self.activation) if self.n_hidden is None else self.n_hidden

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, with the None of n_kv_head resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.n_embd // self.n_head

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values that JSON and YAML hold."""
        values = dataclasses.asdict(self)
        return values if self.rope_scaling is None else values | {"rope_scaling": dict(self.rope_scaling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPTConfig":
        """The configuration that `to_dict` gave.

        Raises:
            UserError: a key that is no field (naming the nearest one), a missing field, or a value that does not fit.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise UserError(f"unknown model key {key!r}{nearest(str(key), fields)} (accepted: {', '.join(fields)})")
        for name, field in fields.items():
            if name not in values and field.default is dataclasses.MISSING:
                raise UserError(f"model key {name!r} is missing")
        return cls(**values)
