"""Causal attention against torch's scaled_dot_product_attention, on heads as they come out of a model's one projection for q, k and v.

FLOPs: a product of T x T scores counts half, because causal attention needs only half of them. Forward has two such products (q k^T and
p v), backward five (the scores again, dv, dp, dq, dk). torch.compile calls the same SDPA, so it is not a variant of its own.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from .harness import Compare, Variant, ours
from .inputs import gradients, normal

# B, H, T, D: GPT-2 124M; a 10M model; a long context; nanoGPT's own CPU run.
SIZES = {"full": [(4, 12, 1024, 64), (8, 6, 256, 64), (1, 12, 4096, 64), (12, 4, 64, 32)], "quick": [(2, 2, 33, 16)]}


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, is_causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def last_head(x: Tensor) -> Tensor:
    """One head of (B, H, T, D) as (1, 1, T, D): heads do not depend on each other, and all of them in float64 take too long."""
    return x[-1:, -1:]


def bench_attention(compare: Compare, size: tuple[int, int, int, int], dtype: str) -> None:
    batch, heads, time, dim = size
    qkv = normal(batch, time, 3 * heads, dim, dtype=dtype)
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=2))  # (B, H, T, D), a row every 3 H D elements
    grad = normal(batch, time, heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    product = 2 * batch * heads * time * (time + 1) // 2 * dim
    scale = 1 / math.sqrt(dim)
    q_wide, k_wide, v_wide = (last_head(x).double() for x in (q, k, v))

    def formula_backward() -> tuple[Tensor, ...]:
        out, lse = reference.attention(q_wide, k_wide, v_wide, True, scale)
        grad_wide = last_head(grad).double()
        return reference.attention_backward(grad_wide, q_wide, k_wide, v_wide, out, lse, True, scale)

    compare(
        "forward", shape=size, dtype=dtype, flops=2 * product,
        expected=lambda: reference.attention(q_wide, k_wide, v_wide, True, scale)[:1], pick=lambda out: (last_head(out),),
        variants=[ours(lambda: our_attention(q, k, v)), Variant("torch SDPA", lambda: torch_attention(q, k, v))],
    )  # fmt: skip
    compare(
        "forward and backward", shape=size, dtype=dtype, flops=7 * product,
        expected=formula_backward, pick=lambda grads: tuple(map(last_head, grads)),
        variants=[
            ours(gradients(our_attention, (q, k, v), grad)),
            Variant("torch SDPA", gradients(torch_attention, (q, k, v), grad)),
        ],
    )  # fmt: skip


def bench_attention_cached(compare: Compare, dtype: str) -> None:
    """One new token against a cache of 1023: what sampling does. Bytes: keys and values are read once."""
    batch, heads, keys, dim = (1, 2, 40, 16) if compare.quick else (1, 12, 1024, 64)
    q = normal(batch, heads, 1, dim, dtype=dtype)
    k, v = (normal(batch, heads, keys, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    compare(
        "one query", shape=(batch, heads, keys, dim), dtype=dtype, label="KV cache", bytes_moved=k.nbytes + v.nbytes,
        expected=lambda: reference.attention(q.double(), k.double(), v.double(), True, 1 / math.sqrt(dim))[:1],
        variants=[
            ours(lambda: our_attention(q, k, v)),
            Variant("torch SDPA", lambda: F.scaled_dot_product_attention(q, k, v)),  # it sees every key: nothing to mask
        ],
    )  # fmt: skip
