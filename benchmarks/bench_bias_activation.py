"""gelu (erf and tanh forms) and relu of x + bias: a GPT-2 hidden layer (2048 x 3072) and a small model's (768 x 512).

Bytes: forward reads x and writes y; backward reads the gradient and what was saved and writes dx (the bias is small).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal, some_rows

SIZES = {"full": [(2048, 3072), (768, 512)], "quick": [(16, 40)]}


def our_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ops.gelu(x, bias=bias)


def our_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return ops.gelu(x, "tanh", bias=bias)


def our_relu(x: Tensor, bias: Tensor) -> Tensor:
    return ops.relu(x, bias=bias)


def torch_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def torch_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def torch_relu(x: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(x + bias)


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (our_gelu, torch_gelu),
    "gelu_tanh": (our_gelu_tanh, torch_gelu_tanh),
    "relu": (our_relu, torch_relu),
}


@pytest.mark.parametrize("kind", list(KINDS))
def bench_bias_activation(compare: Compare, kind: str, size: tuple[int, int], dtype: str) -> None:
    mine, theirs = KINDS[kind]
    x, grad = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=1)
    bias = normal(size[1], dtype=dtype, seed=2)
    inputs = (x, bias)

    def formula() -> tuple[Tensor, ...]:
        return (reference.bias_activation(some_rows(x).double(), bias.double(), kind),)

    def formula_backward() -> tuple[Tensor, ...]:
        wide, wide_bias = x.double(), bias.double()
        saved = reference.bias_activation(wide, wide_bias, kind) if kind in reference.KEEPS_RESULT else wide
        return reference.bias_activation_backward(grad.double(), saved, wide_bias, kind, True)

    compare(
        "forward", shape=size, dtype=dtype, label=kind, bytes_moved=2 * x.nbytes,
        expected=formula, pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: mine(*inputs)),
            Variant("torch eager", lambda: theirs(*inputs)),
            *compare.compiled(theirs, lambda f: lambda: f(*inputs)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, label=kind, bytes_moved=5 * x.nbytes,
        expected=formula_backward, pick=lambda grads: grads,
        variants=[
            ours(gradients(mine, inputs, grad)),
            Variant("torch eager", gradients(theirs, inputs, grad)),
            *compare.compiled(theirs, lambda f: gradients(f, inputs, grad)),
        ],
    )  # fmt: skip
