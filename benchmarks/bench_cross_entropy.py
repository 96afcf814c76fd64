"""cross_entropy of integer targets over GPT-2's vocabulary (4096 rows of 50257) and a character model's (768 rows of 65).

Bytes: forward reads the logits; backward reads them again and writes their gradient. For bf16 logits fastgpt's loss is fp32, torch's
bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal, some_rows

SIZES = {"full": [(4096, 50257), (768, 65)], "quick": [(16, 40)]}
IGNORED = -100


def bench_cross_entropy(compare: Compare, size: tuple[int, int], dtype: str) -> None:
    rows, classes = size
    logits = normal(*size, dtype=dtype)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    grad = torch.tensor(1.0)

    def our_loss(x: Tensor) -> Tensor:
        return ops.cross_entropy(x, target)

    def torch_loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    def formula() -> tuple[Tensor]:
        """The mean over all rows, a few at a time: all of them in float64 are gigabytes."""
        parts = [
            reference.cross_entropy(x.double(), t, IGNORED, "sum", 0.0)[0]
            for x, t in zip(logits.split(256), target.split(256), strict=True)
        ]
        return (torch.stack(parts).sum() / rows,)

    def formula_backward() -> tuple[Tensor]:
        """Some rows' gradients: each row's is its own, over the number of all rows."""
        x, t = some_rows(logits).double(), some_rows(target)
        lse = torch.logsumexp(x, -1)
        share = torch.tensor(1.0 / rows, dtype=torch.float64)
        return (reference.cross_entropy_backward(share, x, t, lse, IGNORED, "sum", 0.0),)

    compare(
        "forward", shape=size, dtype=dtype, bytes_moved=logits.nbytes, expected=formula,
        variants=[
            ours(lambda: our_loss(logits)),
            Variant("torch eager", lambda: torch_loss(logits)),
            *compare.compiled(torch_loss, lambda f: lambda: f(logits)),
        ],
    )  # fmt: skip
    consumed = (
        logits.clone()
    )  # holds the last call's gradient, then logits again: filled anew before each round, untimed

    def refill() -> None:
        """Logits again in place of the last call's gradient; untimed, before each round."""
        consumed.copy_(logits)

    def our_inplace_loss(x: Tensor) -> Tensor:
        return ops.cross_entropy(x, target, inplace_backward=True)

    compare(
        "forward and backward", shape=size, dtype=dtype, bytes_moved=3 * logits.nbytes,
        expected=formula_backward, pick=lambda dx: (some_rows(dx[0]),),
        variants=[
            ours(gradients(our_loss, (logits,), grad)),
            ours(gradients(our_inplace_loss, (consumed,), grad), "fastgpt in place", refill),
            Variant("torch eager", gradients(torch_loss, (logits,), grad.to(logits.dtype))),
            *compare.compiled(torch_loss, lambda f: gradients(f, (logits,), grad.to(logits.dtype))),
        ],
    )  # fmt: skip
