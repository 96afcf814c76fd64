"""rope of a GPT-2 sized layer's queries as a projection leaves them (B4 T1024 H12 D64), both layouts of pairs.

Bytes: forward reads x and writes y, backward the same for the gradient (the tables are small).
"""

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal

SIZES = {"full": [(4, 1024, 12, 64)], "quick": [(1, 8, 2, 16)]}  # batch, time, heads, width of a head


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def bench_rope(compare: Compare, layout: str, size: tuple[int, int, int, int], dtype: str) -> None:
    B, T, H, D = size
    x = normal(B, T, H, D, dtype=dtype).transpose(1, 2)
    grad = normal(B, T, H, D, dtype=dtype, seed=1).transpose(1, 2)
    interleaved = layout == "interleaved"
    cos, sin = ops.rope_tables(D, T)
    # The usual forms: rotate_half of Hugging Face's models, and Meta's complex numbers.
    wide_cos, wide_sin = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    turns = torch.complex(cos, sin)

    def our_rope(x: Tensor) -> Tensor:
        return ops.rope(x, cos, sin, interleaved=interleaved)

    def torch_halves(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
        return x * wide_cos + half * wide_sin

    def torch_interleaved(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    theirs = torch_interleaved if interleaved else torch_halves

    def formula(x: Tensor, inverse: bool) -> tuple[Tensor, ...]:
        return (reference.rope(x.double(), cos, sin, interleaved, inverse),)

    compare(
        "forward", shape=size, dtype=dtype, label=layout, bytes_moved=2 * x.nbytes,
        expected=lambda: formula(x, False),
        variants=[
            ours(lambda: our_rope(x)),
            Variant("torch eager", lambda: theirs(x)),
            *compare.compiled(theirs, lambda f: lambda: f(x)),
        ],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, label=layout, bytes_moved=4 * x.nbytes,
        expected=lambda: formula(grad, True), pick=lambda grads: grads,
        variants=[
            ours(gradients(our_rope, (x,), grad)),
            Variant("torch eager", gradients(theirs, (x,), grad)),
            *compare.compiled(theirs, lambda f: gradients(f, (x,), grad)),
        ],
    )  # fmt: skip
