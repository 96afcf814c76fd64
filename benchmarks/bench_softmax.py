"""softmax over the last dimension: attention scores of GPT-2 (4 x 12 x 1024 rows of 1024) and the vocabulary's (8192 rows of 50257).

Bytes: forward reads x and writes y; backward reads the gradient and y and writes dx.
"""

import torch

from fastgpt import ops
from fastgpt.ops import reference

from . import raw
from .harness import DTYPES, Compare, Variant, ours
from .inputs import gradients, normal, some_rows

SIZES = {"full": [(49152, 1024), (8192, 50257)], "quick": [(32, 100)]}
LARGEST_BACKWARD = 2**28  # elements; forward and backward of the vocabulary's size in fp32 would hold 7 GB


def torch_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def bench_softmax(compare: Compare, size: tuple[int, int], dtype: str) -> None:
    x = normal(*size, dtype=dtype)
    out = torch.empty_like(x)
    wide = some_rows(x).double()
    y_wide = reference.softmax(wide, None, 1.0, False)

    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * x.nbytes,
        expected=lambda: (y_wide,), pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: ops.softmax(x)),
            Variant("torch eager", lambda: torch_softmax(x)),
            *compare.compiled(torch_softmax, lambda f: lambda: f(x)),
        ],
    )  # fmt: skip
    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * x.nbytes, output="preallocated", label="out=",
        expected=lambda: (y_wide,), pick=lambda y: (some_rows(y),),
        variants=[
            ours(lambda: raw.softmax(x, out)),
            Variant("torch out=", lambda: torch.softmax(x, -1, out=out)),
        ],
    )  # fmt: skip
    if x.numel() > LARGEST_BACKWARD:
        return

    grad = normal(*size, dtype=dtype, seed=1)
    grad_wide = some_rows(grad).double()
    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=5 * x.nbytes,
        expected=lambda: (reference.softmax_backward(grad_wide, y_wide, 1.0),), pick=lambda dx: (some_rows(dx[0]),),
        variants=[
            ours(gradients(ops.softmax, (x,), grad)),
            Variant("torch eager", gradients(torch_softmax, (x,), grad)),
            *compare.compiled(torch_softmax, lambda f: gradients(f, (x,), grad)),
        ],
    )  # fmt: skip
    y = torch_softmax(x)
    compare(
        "backward", shape=size, dtype=dtype, bytes_moved=3 * x.nbytes, output="preallocated", label="out=",
        expected=lambda: (reference.softmax_backward(grad_wide, some_rows(y).double(), 1.0),),
        pick=lambda dx: (some_rows(dx),),
        variants=[
            ours(lambda: raw.softmax_backward(grad, y, out)),
            Variant(
                "torch out=",
                lambda: torch.ops.aten._softmax_backward_data.out(grad, y, -1, DTYPES[dtype], grad_input=out),
            ),
        ],
    )  # fmt: skip
