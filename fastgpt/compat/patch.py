"""torch's functional ops exchanged for ours within a `with`, for code that calls them rather than modules.

    with fastgpt.patched():
        loss = somebodys_model(x)      # its F.gelu, F.layer_norm, F.cross_entropy, F.scaled_dot_product_attention are ours

The names of torch.nn.functional are exchanged in the whole process until the last `patched` has ended, whichever thread it is in;
`from torch.nn.functional import gelu` made before keeps torch's. What an op does not do, and input that it refuses, goes to torch's
function, which raises its own errors. Dropout stays torch's (the random numbers of a seed are the same), and so do relu and embedding,
than which ours are no faster.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import functional, ops
from fastgpt.nn.fallback import is_small_weight, or_torch
from fastgpt.nn.linear import reads_few_rows
from fastgpt.nn.modules import class_loss


class _NotOurs(ValueError):
    """What torch's own function is for."""


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return ops.layer_norm(input, tuple(normalized_shape), weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return ops.rms_norm(input, tuple(normalized_shape), weight, eps)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        raise _NotOurs
    return ops.silu(input)


def _along(op: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def run(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        if dim is None:
            raise _NotOurs
        return op(input if dtype is None else input.to(dtype), dim)

    return run


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None or target.is_floating_point():
        raise _NotOurs
    return class_loss(input, target, ignore_index, reduction, label_smoothing)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not reads_few_rows(input) or weight.dim() != 2 or weight.dtype != input.dtype or is_small_weight(weight):
        raise _NotOurs
    return ops.linear(input, weight, bias)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise _NotOurs
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


_OURS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "gelu": ops.gelu,
    "silu": _silu,
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "softmax": _along(ops.softmax),
    "log_softmax": _along(ops.log_softmax),
    "cross_entropy": _cross_entropy,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
}
_lock = threading.Lock()
_depth = 0
_torchs: dict[str, Any] = {}


def _exchange(first: bool) -> None:
    if first:
        for name, ours in _OURS.items():
            theirs = _torchs[name] = getattr(F, name)
            setattr(F, name, or_torch(theirs, f"torch.nn.functional.{name}", quiet=True)(ours))
    else:
        for name, theirs in _torchs.items():
            setattr(F, name, theirs)
        _torchs.clear()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Within it torch.nn.functional's layer_norm, rms_norm, gelu, silu, tanh, sigmoid, softmax, log_softmax, cross_entropy,
    scaled_dot_product_attention and linear (a few rows without gradients) are fastgpt's, with torch's arguments
    and errors. May be nested.

    Example:
        >>> with patched():
        ...     y = torch.nn.functional.gelu(torch.zeros(2))
        >>> y
        tensor([0., 0.])
    """
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _exchange(True)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _exchange(False)
