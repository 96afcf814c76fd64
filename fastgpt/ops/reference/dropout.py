"""Dropout, with the random numbers of Philox4x32-10 (Salmon et al., SC11, table 2 and section 4.3)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def philox(counter: Tensor, seed: Tensor) -> Tensor:
    """(..., 4) words in [0, 2^32) as int64, of int64 counters (their upper 64 bits 0) and a scalar int64 key."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter & low, (counter >> 32) & low, torch.zeros_like(counter), torch.zeros_like(counter)
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, which is all that is read of them
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low) ^ c1 ^ key0,
            product1 & low,
            ((product0 >> 32) & low) ^ c3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], -1)


def dropout_mask(shape: Sequence[int], seed: Tensor, p: float) -> Tensor:
    """True where an element is kept: word i % 4 of philox(i // 4, seed) is at least p 2^32."""
    count = math.prod(shape)
    words = philox(torch.arange((count + 3) // 4, device=seed.device), seed).flatten()[:count]
    return (words >= min(round(p * 2**32), 2**32 - 1)).view(shape)


def dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    """x mask / (1 - p), and the residual; arXiv 1207.0580 with the scale in training."""
    factor = 1 / (1 - p) if p < 1 else 0.0
    y = wide(x) * (dropout_mask(x.shape, seed, p) * factor if p < 1 else 0.0)
    return y.to(x.dtype) if residual is None else (y + wide(residual)).to(residual.dtype)
