"""What the benchmarks are fed: random tensors, never zeros (the operating system maps all zero pages to one), always the same ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import DTYPES


def normal(*shape: int, dtype: str, seed: int = 0) -> Tensor:
    """Standard normal values, float32 rounded to the dtype ("fp32" or "bf16")."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def some_rows(x: Tensor, most: int = 64) -> Tensor:
    """At most about `most` rows of a matrix, spread over all of it, to be checked in float64."""
    return x[:: max(1, x.shape[0] // most)]


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Any]:
    """A call of `function` and its backward pass: gradients of all inputs. Nothing is added up from call to call."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)
