"""layer_norm with weight and bias over GPT-2's width (8192 rows of 768) and a small model's (768 rows of 128).

Bytes: forward reads x and writes y; backward reads the gradient and x and writes dx (weight, bias and the statistics are small).
torch's layer_norm has no `out=`, so there is no preallocated case.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal

SIZES = {"full": [(8192, 768), (768, 128)], "quick": [(16, 40)]}
EPS = 1e-5


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def our_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, (x.shape[-1],), weight, bias, EPS)


def bench_layer_norm(compare: Compare, size: tuple[int, int], dtype: str) -> None:
    x, grad = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=1)
    weight = (1 + 0.1 * normal(size[1], dtype="fp32", seed=2)).to(x.dtype)
    bias = normal(size[1], dtype=dtype, seed=3)
    inputs = (x, weight, bias)

    def formula() -> tuple[Tensor, ...]:
        return reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)

    def formula_backward() -> tuple[Tensor, ...]:
        _, mean, rstd = formula()
        return reference.layer_norm_backward(grad.double(), x.double(), weight.double(), mean, rstd, True)

    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * x.nbytes, expected=lambda: formula()[:1],
        variants=[
            ours(lambda: our_layer_norm(*inputs)),
            Variant("torch eager", lambda: torch_layer_norm(*inputs)),
            *compare.compiled(torch_layer_norm, lambda f: lambda: f(*inputs)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=5 * x.nbytes,
        expected=formula_backward, pick=lambda grads: grads,
        variants=[
            ours(gradients(our_layer_norm, inputs, grad)),
            Variant("torch eager", gradients(torch_layer_norm, inputs, grad)),
            *compare.compiled(torch_layer_norm, lambda f: gradients(f, inputs, grad)),
        ],
    )  # fmt: skip
