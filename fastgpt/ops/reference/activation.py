"""Activations; GELU is arXiv 1606.08415."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide

KEEPS_RESULT = ("relu", "sigmoid", "tanh")  # their gradient needs the result, that of the others the input


def relu(x: Tensor) -> Tensor:
    return torch.where(x < 0, torch.zeros_like(x), x)


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return torch.where(y <= 0, torch.zeros_like(grad), grad)


def sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(-wide(x)))).to(x.dtype)


def sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    s = wide(y)
    return (wide(grad) * s * (1 - s)).to(grad.dtype)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(wide(x)).to(x.dtype)


def tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    return (wide(grad) * (1 - wide(y) ** 2)).to(grad.dtype)


def silu(x: Tensor) -> Tensor:
    v = wide(x)
    return (v / (1 + torch.exp(-v))).to(x.dtype)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    v = wide(x)
    s = 1 / (1 + torch.exp(-v))
    return (wide(grad) * s * (1 + v * (1 - s))).to(grad.dtype)


_CUBIC = 0.044715


def gelu(x: Tensor, approximate: str) -> Tensor:
    v = wide(x)
    if approximate == "tanh":
        u = math.sqrt(2 / math.pi) * (v + _CUBIC * v**3)
        return (0.5 * v * (1 + torch.tanh(u))).to(x.dtype)
    return (0.5 * v * (1 + torch.erf(v / math.sqrt(2)))).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    v, g = wide(x), wide(grad)
    if approximate == "tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + _CUBIC * v**3))
        slope = math.sqrt(2 / math.pi) * (1 + 3 * _CUBIC * v**2)
        return (g * (0.5 * (1 + t) + 0.5 * v * (1 - t**2) * slope)).to(grad.dtype)
    density = torch.exp(-0.5 * v**2) / math.sqrt(2 * math.pi)
    return (g * (0.5 * (1 + torch.erf(v / math.sqrt(2))) + v * density)).to(grad.dtype)


def by_name(kind: str, backward: bool = False) -> Callable[..., Tensor]:
    """The formula of an activation, or of its gradient, by the name that other ops give it; "" is none."""
    if not kind:
        return lambda *tensors: tensors[0]
    name, options = ("gelu", ("none" if kind == "gelu" else "tanh",)) if kind.startswith("gelu") else (kind, ())
    f = globals()[f"{name}_backward" if backward else name]
    return lambda *tensors: f(*tensors, *options)


def derivative(x: Tensor, kind: str) -> Tensor:
    """An activation's derivative."""
    kept = by_name(kind)(x) if kind in KEEPS_RESULT else x
    return by_name(kind, backward=True)(torch.ones_like(x), kept)
