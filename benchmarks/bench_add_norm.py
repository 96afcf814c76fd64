"""A residual and the layer norm or RMS norm after it, over GPT-2's width (8192 rows of 768) and a small model's (768 rows of 128).

Bytes: forward reads both addends and writes the sum and the norm; backward reads both gradients and the sum and writes one gradient.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import normal

SIZES = {"full": [(8192, 768), (768, 128)], "quick": [(16, 40)]}
EPS = 1e-5

Results = tuple[Tensor, ...]


def torch_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
    summed = x + residual
    return F.layer_norm(summed, (x.shape[-1],), weight, bias, EPS), summed


def torch_rms(x: Tensor, residual: Tensor, weight: Tensor) -> Results:
    summed = x + residual
    return F.rms_norm(summed, (x.shape[-1],), weight, EPS), summed


def our_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return ops.add_layer_norm(x, residual, (x.shape[-1],), weight, bias, EPS)


def our_rms(x: Tensor, residual: Tensor, weight: Tensor) -> Results:
    return ops.add_rms_norm(x, residual, (x.shape[-1],), weight, EPS)


def gradients(function: Callable[..., Results], inputs: Results, grads: Results) -> Callable[[], Results]:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grads)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def bench_add_norm(compare: Compare, kind: str, size: tuple[int, int], dtype: str) -> None:
    x, residual = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=4)
    grads = normal(*size, dtype=dtype, seed=1), normal(*size, dtype=dtype, seed=5)
    weight = (1 + 0.1 * normal(size[1], dtype="fp32", seed=2)).to(x.dtype)
    params = (weight, normal(size[1], dtype=dtype, seed=3)) if kind == "layer" else (weight,)
    mine, theirs = (our_layer, torch_layer) if kind == "layer" else (our_rms, torch_rms)
    inputs = (x, residual, *params)

    def normed(summed: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (
            reference.layer_norm(summed, weight, bias, EPS)[0]
            if bias is not None
            else reference.rms_norm(summed, weight, EPS)[0]
        )

    # The sum is rounded in all variants, so the exact norm is that of the rounded sum.
    def formula() -> Results:
        summed = (x + residual).double()
        return normed(summed, *(p.double() for p in params)), summed

    def formula_backward() -> Results:
        leaves = [t.double().requires_grad_() for t in (x + residual, *params)]
        found = torch.autograd.grad((normed(*leaves), leaves[0] * 1), leaves, [g.double() for g in grads])
        return found[0], found[0], *found[1:]

    compare(
        "forward", shape=size, dtype=dtype, label=kind, bytes_moved=4 * x.nbytes,
        expected=formula, pick=lambda results: tuple(results),
        variants=[
            ours(lambda: mine(*inputs)),
            Variant("torch eager", lambda: theirs(*inputs)),
            *compare.compiled(theirs, lambda f: lambda: f(*inputs)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, label=kind, bytes_moved=8 * x.nbytes,
        expected=formula_backward, pick=lambda found: found,
        variants=[
            ours(gradients(mine, inputs, grads)),
            Variant("torch eager", gradients(theirs, inputs, grads)),
            *compare.compiled(theirs, lambda f: gradients(f, inputs, grads)),
        ],
    )  # fmt: skip
