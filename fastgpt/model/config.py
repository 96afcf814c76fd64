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
from fastgpt.nn import ACTIVATIONS


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" for the accepted name closest to `name`, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(accepted), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape, arithmetic and starting weights of a GPT.

    Attributes:
        vocab_size: rows of the token embedding and width of the logits, V; at least the tokenizer's n_vocab.
        block_size: the longest context in tokens; rows of the position embedding.
        n_layer: blocks.
        n_head: query heads; divides n_embd.
        n_kv_head: heads of keys and values, shared between query heads; divides n_head. None: n_head.
        n_embd: width of the residual stream, C.
        dropout: probability on the embeddings and on both outputs of every block, in [0, 1); never on attention
            probabilities.
        bias: whether the linear layers and the layer norms of the blocks have one (the final norm too).
        activation: relu, sigmoid, tanh, gelu (erf form), gelu_tanh (GPT-2's) or silu.
        init: gpt2, normal, zeros, xavier or he; see fastgpt.model.init.

    Raises:
        UserError: a field of the wrong type or out of its range; a ValueError.

    Example:
        >>> GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128).head_dim
        32
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

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            value = getattr(self, name)
            if name == "n_kv_head" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: got {value!r}; accepted: a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head: got {self.n_head}; n_embd = {self.n_embd} must be a multiple of it")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_kv_head: got {self.n_kv_head}; n_head = {self.n_head} must be a multiple of it")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout: got {self.dropout!r}; accepted: a number from 0 up to but not including 1")
        if not isinstance(self.bias, bool):
            raise UserError(f"bias: got {self.bias!r}; accepted: true or false")
        for name, accepted in (("activation", tuple(ACTIVATIONS)), ("init", INIT_SCHEMES)):
            value = getattr(self, name)
            if value not in accepted:
                raise UserError(
                    f"{name}: got {value!r}; accepted: {', '.join(accepted)}{nearest(str(value), accepted)}"
                )

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
        return dataclasses.asdict(self)

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
