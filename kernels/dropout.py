"""Dropout, alone or with a residual added: y = x mask / (1 - p) + residual, the mask made from the seed and never stored.

Element i is kept where word i % 4 of philox4x32_10(counter i // 4, key seed) is at least p 2^32: the same mask as every other engine's.
A program makes the four words of each of its counters once and puts them in the elements' order. The backward is the same kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dropout"]

BLOCK = 512  # counters a program: four elements each


@triton.jit
def dropout_kernel(
    x_ptr, residual_ptr, seed_ptr, y_ptr, n, threshold, scale, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    counter = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * BLOCK_N,))
    i = pid * (4 * BLOCK_N) + tl.arange(0, 4 * BLOCK_N)
    inside = i < n
    factor = tl.where(words >= threshold.to(tl.uint32), scale, 0.0)
    y = tl.load(x_ptr + i, mask=inside).to(tl.float32) * factor
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + i, mask=inside).to(tl.float32)
    tl.store(y_ptr + i, y, mask=inside)


def dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """The op: x of any shape, a residual of that shape or None, a scalar int64 seed on x's device, 0 <= p < 1.

    Returns:
        The shape of x and the dtype of the residual, or else of x; contiguous.
    """
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=x.dtype if residual is None else residual.dtype)
    n = x.numel()
    if n:
        threshold = min(round(p * 2**32), 2**32 - 1)
        dropout_kernel[(triton.cdiv(n, 4 * BLOCK),)](
            x, residual, seed, y, n, threshold, 1.0 / (1.0 - p), residual is not None, BLOCK, num_warps=4
        )
    return y
