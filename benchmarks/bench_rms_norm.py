"""rms_norm with weight over GPT-2's width (8192 rows of 768) and a small model's (768 rows of 128).

Bytes: forward reads x and writes y; backward reads the gradient and x and writes dx (weight and statistics are small).
torch's rms_norm has no `out=`, so there is no preallocated case.
"""

import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal

SIZES = {"full": [(8192, 768), (768, 128)], "quick": [(16, 40)]}
EPS = 1e-5


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def our_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return ops.rms_norm(x, (x.shape[-1],), weight, EPS)


def bench_rms_norm(compare: Compare, size: tuple[int, int], dtype: str) -> None:
    x, grad = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=1)
    weight = (1 + 0.1 * normal(size[1], dtype="fp32", seed=2)).to(x.dtype)
    inputs = (x, weight)

    def formula() -> tuple[Tensor, ...]:
        return reference.rms_norm(x.double(), weight.double(), EPS)

    def formula_backward() -> tuple[Tensor, ...]:
        return reference.rms_norm_backward(grad.double(), x.double(), weight.double(), formula()[1], True)

    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * x.nbytes, expected=lambda: formula()[:1],
        variants=[
            ours(lambda: our_rms_norm(*inputs)),
            Variant("torch eager", lambda: torch_rms_norm(*inputs)),
            *compare.compiled(torch_rms_norm, lambda f: lambda: f(*inputs)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=5 * x.nbytes,
        expected=formula_backward, pick=lambda grads: grads,
        variants=[
            ours(gradients(our_rms_norm, inputs, grad)),
            Variant("torch eager", gradients(torch_rms_norm, inputs, grad)),
            *compare.compiled(torch_rms_norm, lambda f: gradients(f, inputs, grad)),
        ],
    )  # fmt: skip
