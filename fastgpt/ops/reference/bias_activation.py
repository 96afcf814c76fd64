"""activation(x + bias)."""

from torch import Tensor

from fastgpt.ops.reference.activation import KEEPS_RESULT, by_name
from fastgpt.ops.reference.common import wide


def bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    return by_name(kind)(wide(x) + wide(bias)).to(x.dtype)


def bias_activation_backward(
    grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx, and its sum over all but the last dimension, which is empty where `needs_bias` is false."""
    kept = wide(saved) if kind in KEEPS_RESULT else wide(saved) + wide(bias)
    dx = by_name(kind, backward=True)(wide(grad), kept)
    if not needs_bias:
        return dx.to(saved.dtype), bias.new_empty(0)
    return dx.to(saved.dtype), dx.reshape(-1, bias.numel()).sum(0).to(bias.dtype)
