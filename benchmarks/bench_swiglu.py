"""swiglu and geglu of a hidden layer, gate and up as two tensors and as the halves of one (2048 rows of 2048).

Bytes: forward reads gate and up and writes y; backward reads the gradient, gate and up and writes two gradients.
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

SIZES = {"full": [(2048, 2048)], "quick": [(16, 40)]}


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def torch_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def torch_swiglu_packed(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def torch_geglu_packed(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.gelu(gate) * up


VARIANTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (ops.swiglu, torch_swiglu),
    "swiglu packed": (ops.swiglu, torch_swiglu_packed),
    "geglu": (ops.geglu, torch_geglu),
    "geglu packed": (ops.geglu, torch_geglu_packed),
}


@pytest.mark.parametrize("kind", list(VARIANTS))
def bench_swiglu(compare: Compare, kind: str, size: tuple[int, int], dtype: str) -> None:
    mine, theirs = VARIANTS[kind]
    rows, cols = size
    packed = kind.endswith("packed")
    shapes = [(rows, 2 * cols)] if packed else [(rows, cols), (rows, cols)]
    inputs = tuple(normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    grad = normal(rows, cols, dtype=dtype, seed=5)
    wide, grad_wide = [some_rows(x).double() for x in inputs], some_rows(grad).double()
    if packed:
        wide = list(wide[0].chunk(2, -1))

    def formula() -> tuple[Tensor, ...]:
        return (reference.swiglu(wide[0], wide[1]) if "swiglu" in kind else reference.geglu(wide[0], wide[1], "none"),)

    def formula_backward() -> tuple[Tensor, ...]:
        if "swiglu" in kind:
            found = reference.swiglu_backward(grad_wide, wide[0], wide[1])
        else:
            found = reference.geglu_backward(grad_wide, wide[0], wide[1], "none")
        return (torch.cat(found, -1),) if packed else found

    compare(
        "forward", shape=size, dtype=dtype, label=kind, bytes_moved=3 * grad.nbytes,
        expected=formula, pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: mine(*inputs)),
            Variant("torch eager", lambda: theirs(*inputs)),
            *compare.compiled(theirs, lambda f: lambda: f(*inputs)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, label=kind, bytes_moved=8 * grad.nbytes,
        expected=formula_backward, pick=lambda grads: tuple(some_rows(g) for g in grads),
        variants=[
            ours(gradients(mine, inputs, grad)),
            Variant("torch eager", gradients(theirs, inputs, grad)),
            *compare.compiled(theirs, lambda f: gradients(f, inputs, grad)),
        ],
    )  # fmt: skip
