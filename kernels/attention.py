"""Attention forward in tiles that never leave the chip (arXiv 2205.14135, algorithm 1; the loop order of 2307.08691).

For each query of a head, over the keys that it sees, with the running maximum and sum of arXiv 1805.02867:

    s = scale * query key^T;   out = softmax(s) value;   lse = log sum exp s

Tensors are (B, H, T, D) with neighbouring elements along D; the other strides are free. H / H_kv neighbouring query heads share a key
head. Which keys a query sees, the soft cap and dropout: attention_tiles.py. A row that sees nothing is 0 with lse -inf. Head sizes
from 1 to 256, padded to a power of two of at least 16. Scores and sums in fp32; the two matrix products take the input's own type
(probabilities are rounded to it), float32 without TF32 unless torch allows it.

No additive mask. The gradient is in attention_backward.py; few queries over many keys go to attention_decode.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import attention_decode, tuning
from fastgpt.kernels.attention_tiles import (
    LN_2,
    MAX_DIM,
    NO_LIMIT,
    Options,
    block_d,
    cap_scores,
    heads_inside,
    kept,
    key_range,
    launch_attention,
    load_rows,
    rows_together,
    sees,
    sequence_rows,
    stages,
    store_rows,
    tile_for,
)

__all__ = ["MAX_DIM", "attention"]

# (BLOCK_M, BLOCK_N, warps) by the padded head size; half types, then float32, whose exact products run on the ordinary cores
TILES = {16: (128, 64, 4), 32: (128, 64, 4), 64: (128, 64, 4), 128: (128, 64, 8), 256: (64, 32, 8)}
TILES_FP32 = {16: (64, 32, 4), 32: (64, 32, 4), 64: (64, 32, 8), 128: (32, 16, 8), 256: (16, 32, 4)}
CHOICES = tuning.candidates(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, stride_k, stride_v, start, stop, keys, at, left, right, weights, d, dim, scale, cap, seed,
    threshold, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the keys from `start` to `stop`; MASKED where a query may not see all of them."""
    for start_n in range(start, stop, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, keys, stride_k, d, dim, EVEN_D, OPERAND)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        s, _ = cap_scores(product, scale, cap, SOFTCAP)
        if MASKED:
            s = tl.where(sees(n[None, :], at[:, None], keys, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: keep the sum 0 instead of NaN
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, axis=1)
        if DROPOUT:  # after the sum, which is that of all weights
            p = tl.where(kept(weights, start_n, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT), p, 0.0)
        v = load_rows(v_ptr, n, keys, stride_v, d, dim, EVEN_D, OPERAND)
        acc = tl.dot(p.to(OPERAND), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["left", "right", "threshold"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_ob, stride_oh, stride_ot, heads, group, longest, all_queries, all_keys, dim, left, right, scale, cap, seed_ptr,
    threshold, factor, cu_q_ptr, cu_k_ptr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, PACKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head a program; under a causal mask those that see most keys first."""
    blocks = tl.cdiv(longest, BLOCK_M)
    sequence_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = sequence_head % heads
    batch, q_start, queries, k_start, keys = sequence_rows(
        sequence_head // heads, cu_q_ptr, cu_k_ptr, all_queries, all_keys, PACKED
    )
    if PACKED and block * BLOCK_M >= queries:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = m + keys - queries  # the position of each query among the keys
    rows = (batch * heads + head) * all_queries + q_start + m

    q_ptr += batch * stride_qb + head * stride_qh + q_start * stride_qt
    k_ptr += batch * stride_kb + head // group * stride_kh + k_start * stride_kt
    v_ptr += batch * stride_vb + head // group * stride_vh + k_start * stride_vt
    q = load_rows(q_ptr, m, queries, stride_qt, d, dim, EVEN_D, OPERAND)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    weights = rows * all_keys + k_start
    start, full, stop = key_range(block * BLOCK_M, queries, keys, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    if not HAS_LEFT:
        acc, top, total = _attend(
            acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, start, full, keys, at, left, right, weights, d, dim, scale, cap,
            seed, threshold, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EVEN_D, BLOCK_M, BLOCK_N, OPERAND, PRECISION,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, full, stop, keys, at, left, right, weights, d, dim, scale, cap, seed,
        threshold, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EVEN_D, BLOCK_M, BLOCK_N, OPERAND, PRECISION,
    )  # fmt: skip

    sees_some = (m < queries) & (keys > 0)
    if HAS_RIGHT:
        sees_some = sees_some & (at + right >= 0)
    if DROPOUT:
        acc = acc * factor
    out = tl.where(sees_some[:, None], acc / total[:, None], 0.0)
    lse = tl.where(sees_some, (top + tl.log2(total)) * LN_2, float("-inf"))
    out_ptr += batch * stride_ob + head * stride_oh + q_start * stride_ot
    store_rows(out_ptr, out, m, queries, stride_ot, d, dim)
    tl.store(lse_ptr + rows, lse, mask=m < queries)


def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The op's forward.

    Args:
        query: (B, H, Tq, D), any strides (copied where D's is not 1).
        key, value: (B, H_kv, Tk, D) of the query's dtype; H is a multiple of H_kv.

    Returns:
        out (B, H, Tq, D) of the query's dtype, in memory (B, Tq, H, D); lse (B, H, Tq) float32.
    """
    if attention_decode.is_better(query, key, options):
        return attention_decode.attention_decode(query, key, value, None, None, None, options)
    q, k, v = rows_together(query), rows_together(key), rows_together(value)
    out = heads_inside(q)
    batch, heads, queries, dim = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    sequences, longest, _ = options.sequences(q, k)
    if lse.numel() == 0 or sequences == 0:
        return out, lse
    width = block_d(dim)
    block_m, block_n, warps = (TILES_FP32 if q.dtype == torch.float32 else TILES)[width]
    if longest < block_m:  # a short prompt: no larger a tile than the queries fill
        block_m = max(16, triton.next_power_of_2(longest))
        warps = min(warps, 4)
    flags = options.flags(k.shape[2])
    block_m, block_n, warps = tile_for((block_m, block_n, warps), flags[3], 64)
    if any(flags[2:]) and width == 256 and q.dtype == torch.float32:
        block_n, warps = 16, 8  # with a soft cap, dropout or packed sequences 32 keys spill
    longest = max(longest, 1)
    args = (
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], heads, heads // k.shape[1], longest,
        queries, k.shape[2], dim, *options.values(),
    )  # fmt: skip
    launch_attention(
        attention_fwd_kernel, args, flags, lambda tile: (triton.cdiv(longest, tile["BLOCK_M"]) * sequences * heads,), q,
        (block_m, block_n, warps), CHOICES, num_stages=stages(q), **(NO_LIMIT if flags[3] or q.dtype == torch.float32 else {}),
    )  # fmt: skip
    return out, lse
