"""relu, sigmoid, tanh, gelu (erf and tanh forms) and silu of 8 million elements, and of a small model's hidden layer (768 x 512).

Bytes: forward reads x and writes y; backward reads the gradient and what was saved and writes dx.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from . import raw
from .harness import Compare, Variant, ours
from .inputs import gradients, normal, some_rows

SIZES = {"full": [(8192, 1024), (768, 512)], "quick": [(16, 40)]}
aten = torch.ops.aten


@dataclasses.dataclass
class Activation:
    """One activation in all its forms; `keeps` is what its gradient needs, "x" or "y"."""

    ours: Callable[[Tensor], Tensor]
    torch: Callable[[Tensor], Tensor]
    torch_out: Callable[[Tensor, Tensor], Tensor]
    torch_backward_out: Callable[[Tensor, Tensor, Tensor], Tensor]
    formula: Callable[[Tensor], Tensor]
    formula_backward: Callable[[Tensor, Tensor], Tensor]
    keeps: str


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": Activation(
        ops.relu, torch.relu, lambda x, y: torch.clamp_min(x, 0, out=y),  # torch.relu has no out=
        lambda g, y, dx: aten.threshold_backward.grad_input(g, y, 0, grad_input=dx),
        reference.relu, reference.relu_backward, "y",
    ),
    "sigmoid": Activation(
        ops.sigmoid, torch.sigmoid, lambda x, y: torch.sigmoid(x, out=y),
        lambda g, y, dx: aten.sigmoid_backward.grad_input(g, y, grad_input=dx),
        reference.sigmoid, reference.sigmoid_backward, "y",
    ),
    "tanh": Activation(
        ops.tanh, torch.tanh, lambda x, y: torch.tanh(x, out=y),
        lambda g, y, dx: aten.tanh_backward.grad_input(g, y, grad_input=dx),
        reference.tanh, reference.tanh_backward, "y",
    ),
    "gelu": Activation(
        ops.gelu, F.gelu, lambda x, y: aten.gelu.out(x, approximate="none", out=y),
        lambda g, x, dx: aten.gelu_backward.grad_input(g, x, approximate="none", grad_input=dx),
        lambda x: reference.gelu(x, "none"), lambda g, x: reference.gelu_backward(g, x, "none"), "x",
    ),
    "gelu_tanh": Activation(
        lambda x: ops.gelu(x, approximate="tanh"), gelu_tanh, lambda x, y: aten.gelu.out(x, approximate="tanh", out=y),
        lambda g, x, dx: aten.gelu_backward.grad_input(g, x, approximate="tanh", grad_input=dx),
        lambda x: reference.gelu(x, "tanh"), lambda g, x: reference.gelu_backward(g, x, "tanh"), "x",
    ),
    "silu": Activation(
        ops.silu, F.silu, lambda x, y: aten.silu.out(x, out=y),
        lambda g, x, dx: aten.silu_backward.grad_input(g, x, grad_input=dx),
        reference.silu, reference.silu_backward, "x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def bench_activation(compare: Compare, kind: str, size: tuple[int, int], dtype: str) -> None:
    entry = ACTIVATIONS[kind]
    x, grad = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    wide, grad_wide = some_rows(x).double(), some_rows(grad).double()
    saved_wide = wide if entry.keeps == "x" else entry.formula(wide)
    large = x.numel() >= 2**20 or compare.quick  # below it nothing is mapped anew, and out= tells nothing

    compare(
        "forward", shape=size, dtype=dtype, label=kind, bytes_moved=2 * x.nbytes,
        expected=lambda: (entry.formula(wide),), pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: entry.ours(x)),
            Variant("torch eager", lambda: entry.torch(x)),
            *compare.compiled(entry.torch, lambda f: lambda: f(x)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, label=kind, bytes_moved=5 * x.nbytes,
        expected=lambda: (entry.formula_backward(grad_wide, saved_wide),), pick=lambda dx: (some_rows(dx[0]),),
        variants=[
            ours(gradients(entry.ours, (x,), grad)),
            Variant("torch eager", gradients(entry.torch, (x,), grad)),
            *compare.compiled(entry.torch, lambda f: gradients(f, (x,), grad)),
        ],
    )  # fmt: skip
    if not large:
        return
    compare(
        "forward", shape=size, dtype=dtype, label=f"{kind} out=", bytes_moved=2 * x.nbytes, output="preallocated",
        expected=lambda: (entry.formula(wide),), pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: raw.activation(kind, x, out)),
            Variant("torch out=", lambda: entry.torch_out(x, out)),
        ],
    )  # fmt: skip
    saved = x if entry.keeps == "x" else entry.torch(x)
    compare(
        "backward", shape=size, dtype=dtype, label=f"{kind} out=", bytes_moved=3 * x.nbytes, output="preallocated",
        expected=lambda: (entry.formula_backward(grad_wide, some_rows(saved).double()),),
        pick=lambda dx: (some_rows(dx),),
        variants=[
            ours(lambda: raw.activation_backward(kind, grad, saved, out)),
            Variant("torch out=", lambda: entry.torch_backward_out(grad, saved, out)),
        ],
    )  # fmt: skip
