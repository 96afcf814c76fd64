"""embedding of 8192 ids in GPT-2's vocabulary (50257 rows of 768) and of 768 in a character model's (65 rows of 128).

Bytes: forward reads and writes a row an id; the backward into a gradient that is there reads a row an id and reads and writes the
rows that occur; the backward into a fresh gradient writes the whole matrix. "into .grad" times `backward` alone where a gradient is in
place: torch makes a whole matrix and adds it, fastgpt (accumulate_grad) adds the rows. Gradients grow from call to call there; the
first is compared.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal, some_rows

SIZES = {"full": [(8192, 50257, 768), (768, 65, 128)], "quick": [(16, 40, 24)]}


def bench_embedding(compare: Compare, size: tuple[int, int, int], dtype: str) -> None:
    count, rows, cols = size
    weight, grad = normal(rows, cols, dtype=dtype), normal(count, cols, dtype=dtype, seed=1)
    ids = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(2))

    def our_embedding(w: Tensor) -> Tensor:
        return ops.embedding(ids, w)

    def torch_embedding(w: Tensor) -> Tensor:
        return F.embedding(ids, w)

    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=2 * grad.nbytes, expected=lambda: (weight.double()[ids],),
        variants=[
            ours(lambda: our_embedding(weight)),
            Variant("torch eager", lambda: torch_embedding(weight)),
            *compare.compiled(torch_embedding, lambda f: lambda: f(weight)),
        ],
    )  # fmt: skip

    def formula() -> tuple[Tensor]:
        return (some_rows(reference.embedding_backward(grad.double(), ids, rows, -1)),)

    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=3 * grad.nbytes + weight.nbytes,
        expected=formula, pick=lambda dw: (some_rows(dw[0]),),
        variants=[
            ours(gradients(our_embedding, (weight,), grad)),
            Variant("torch eager", gradients(torch_embedding, (weight,), grad)),
            *compare.compiled(torch_embedding, lambda f: gradients(f, (weight,), grad)),
        ],
    )  # fmt: skip

    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)

    results = [ops.embedding(ids, leaves[0], accumulate_grad=True), torch_embedding(leaves[1])]

    def into(side: int) -> Tensor | None:
        results[side].backward(grad, retain_graph=True)
        return leaves[side].grad

    compare(
        "backward into .grad", shape=size, dtype=dtype, bytes_moved=5 * grad.nbytes, label="into .grad",
        expected=formula, pick=lambda dw: (some_rows(dw),),
        variants=[
            ours(lambda: into(0)),
            Variant("torch eager", lambda: into(1)),
        ],
    )  # fmt: skip
