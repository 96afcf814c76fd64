"""Gated linear units, arXiv 2002.05202; without `up` the gate holds both halves."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.ops.reference.activation import gelu, gelu_backward, silu, silu_backward
from fastgpt.ops.reference.common import wide


def _gated(gate: Tensor, up: Tensor | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    left, right = gate.chunk(2, -1) if up is None else (gate, up)
    return (f(wide(left)) * wide(right)).to(gate.dtype)


def _gated_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    f: Callable[[Tensor], Tensor],
    f_backward: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """dgate and dup; both in the first and the second empty, where the gate holds both halves."""
    left, right = gate.chunk(2, -1) if up is None else (gate, up)
    dgate = f_backward(wide(grad) * wide(right), wide(left)).to(gate.dtype)
    dup = (wide(grad) * f(wide(left))).to(gate.dtype)
    return (torch.cat([dgate, dup], -1), gate.new_empty(0)) if up is None else (dgate, dup)


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return _gated(gate, up, silu)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return _gated_backward(grad, gate, up, silu, silu_backward)


def geglu(gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
    return _gated(gate, up, lambda x: gelu(x, approximate))


def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _gated_backward(
        grad, gate, up, lambda x: gelu(x, approximate), lambda g, x: gelu_backward(g, x, approximate)
    )
