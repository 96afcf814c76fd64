"""attn_implementation="fastgpt" for transformers.

    fastgpt.compat.hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastgpt")

Masks are those of "sdpa": where none is needed there is none, or one that says "causal", and `ops.attention` computes the layer. With
another mask (left padding, a sliding window shorter than the text), dropout on the probabilities or a position bias, transformers'
own sdpa does; this is logged once. (Dropout of a model given to `fastgpt.accelerate` without keep_dropout is the op's.)
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

from fastgpt import ops
from fastgpt.compat.blocks import DropoutPart
from fastgpt.compat.masks import is_causal_only
from fastgpt.nn.fallback import is_small

NAME = "fastgpt"
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # of transformers, whose code was looked at
_log = logging.getLogger("fastgpt")


@functools.cache
def _log_once(what: str) -> None:
    _log.info("attention with %s is computed by transformers' sdpa", what)


@functools.cache
def _sdpa() -> Callable[..., tuple[torch.Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, H_kv, T_k, D) to (B, T, H, D), None."""
    theirs = functools.partial(
        _sdpa(), module, query, key, value, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    queries = query.shape[2]
    if (
        queries == 1 and query.dtype == torch.float32 and is_small(key, "cache")
    ):  # a token of a small model: every us counts
        return theirs(attention_mask=attention_mask)
    if attention_mask is not None and queries == key.shape[2] and is_causal_only(attention_mask, queries):
        attention_mask, is_causal = None, True
    what = None
    if attention_mask is not None:
        what = "a mask"
    elif dropout and not isinstance(getattr(module, "attn_dropout", None), DropoutPart):  # made ours by `accelerate`
        what = "dropout on the probabilities"
    elif any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        what = "a position bias, a soft cap or a paged cache"
    elif kwargs.get("output_attentions") or kwargs.get("head_mask") is not None:
        what = "a head mask or its probabilities asked for"  # sdpa has neither, and says so
    elif key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.dtype != key.dtype:
        what = "keys and values of different kinds"
    if what is not None:
        _log_once(what)
        return theirs(attention_mask=attention_mask)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    if causal:  # keys behind the last query (a cache of a fixed size, not full yet) are seen by none
        key, value = key[:, :, :queries], value[:, :, :queries]
    y = ops.attention(query, key, value, is_causal=causal, scale=scaling, dropout_p=dropout)  # (B, H, T, D)
    return y.transpose(1, 2), None


class Before(str):
    """The attention that a model had, which makes ours known again where the model is unpickled: in another process, too."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _before, (str(self),)


def _before(name: str) -> Before:
    register()
    return Before(name)


def is_supported() -> bool:
    """Whether this transformers (from 4.53 on) asks the attention what masks it needs."""
    return importlib.util.find_spec("transformers.masking_utils") is not None


def register() -> None:
    """Makes attn_implementation="fastgpt" known to transformers; twice does no harm.

    Raises:
        ImportError: transformers is not installed, or older than 4.53.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
