"""dropout, p = 0.1, over GPT-2's width (8192 rows of 768) and a small model's (768 rows of 128).

Bytes: forward reads x and writes y; backward reads the gradient and writes dx. torch draws other masks, so the comparison with the
formula does not know the mask: every element is 0 or x / (1 - p), and the share of zeros is near p. The tests compare the mask itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops

from .harness import Compare, Variant, ours
from .inputs import gradients, normal

SIZES = {"full": [(8192, 768), (768, 128)], "quick": [(16, 40)]}
P = 0.1


def torch_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, P)


def our_dropout(x: Tensor) -> Tensor:
    return ops.dropout(x, P)


def is_dropout_of(x: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A check that does not know the mask: 1 where every element is 0 or x / (1 - p) and the share of zeros is near p."""

    def pick(y: Tensor) -> tuple[Tensor, ...]:
        kept = (y.float() - x.float() / (1 - P)).abs() <= 2e-2 * x.float().abs()
        share = float((y == 0).double().mean())
        fair = abs(share - P) < 6 * (P * (1 - P) / y.numel()) ** 0.5 + 1e-3
        return (((y == 0) | kept).all().double() * fair,)

    return pick


def bench_dropout(compare: Compare, size: tuple[int, int], dtype: str) -> None:
    x, grad = normal(*size, dtype=dtype), normal(*size, dtype=dtype, seed=1)
    yes = (torch.ones((), dtype=torch.float64),)
    is_masked = is_dropout_of(x)
    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * x.nbytes, expected=lambda: yes, pick=is_masked,
        variants=[
            ours(lambda: our_dropout(x)),
            Variant("torch eager", lambda: torch_dropout(x)),
            *compare.compiled(torch_dropout, lambda f: lambda: f(x)),
        ],
    )  # fmt: skip
    is_masked_gradient = is_dropout_of(grad)
    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=4 * x.nbytes, expected=lambda: yes,
        pick=lambda dx: is_masked_gradient(dx[0]),
        variants=[
            ours(gradients(our_dropout, (x,), grad)),
            Variant("torch eager", gradients(torch_dropout, (x,), grad)),
            *compare.compiled(torch_dropout, lambda f: gradients(f, (x,), grad)),
        ],
    )  # fmt: skip
