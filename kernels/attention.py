"""Attention forward in tiles that never leave the chip (arXiv 2205.14135, algorithm 1; the loop order of 2307.08691).

For each query of a head, over the keys that it sees, with the running maximum and sum of arXiv 1805.02867:

    s = scale * query key^T;   out = softmax(s) value;   lse = log sum exp s

Tensors are (B, H, T, D) with neighbouring elements along D; the other strides are free. H / H_kv neighbouring query heads share a key
head. With is_causal, query i sees keys j <= i + Tk - Tq (aligned to the bottom right, right for a KV cache). A row that sees nothing is
0 with lse -inf. Head sizes from 1 to 256, padded to a power of two of at least 16. Scores and sums in fp32; the two matrix products
take the input's own type (probabilities are rounded to it), float32 without TF32 unless torch allows it.

No dropout, no additive mask. The gradient is in attention_backward.py; a decode step with few queries and many keys is not split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import architecture, dot_precision, operand

__all__ = ["MAX_DIM", "attention"]

MAX_DIM = 256
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# (BLOCK_M, BLOCK_N, warps) by the padded head size; half types, then float32, whose exact products run on the ordinary cores
TILES = {16: (128, 64, 4), 32: (128, 64, 4), 64: (128, 64, 4), 128: (128, 64, 8), 256: (64, 32, 8)}
TILES_FP32 = {16: (64, 32, 4), 32: (64, 32, 4), 64: (64, 32, 8), 128: (32, 16, 8), 256: (16, 32, 4)}


@triton.jit
def load_rows(ptr, rows, n_rows, stride, d, dim, EVEN_D: tl.constexpr, OPERAND: tl.constexpr):
    """Rows (BLOCK, BLOCK_D) of one head as operands of tl.dot; 0 outside."""
    ptrs = ptr + (rows.to(tl.int64) * stride)[:, None] + d[None, :]
    if EVEN_D:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None] & (d < dim)[None, :], other=0.0)
    return tile.to(OPERAND)


@triton.jit
def store_rows(ptr, tile, rows, n_rows, stride, d, dim):
    """The opposite of load_rows, rounding to the tensor's type."""
    ptrs = ptr + (rows.to(tl.int64) * stride)[:, None] + d[None, :]
    tl.store(ptrs, tile, mask=(rows < n_rows)[:, None] & (d < dim)[None, :])


@triton.jit
def key_range(first, queries, keys, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For BLOCK_M queries from `first`: all see every key below `full`, a multiple of BLOCK_N; none sees a key from `stop` on."""
    full = keys // BLOCK_N * BLOCK_N
    stop = keys
    if IS_CAUSAL:
        full = tl.maximum(first + keys - queries + 1, 0) // BLOCK_N * BLOCK_N
        stop = tl.maximum(tl.minimum(first + BLOCK_M + keys - queries, keys), full)
    return full, stop


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, stride_k, stride_v, start, stop, keys, last, d, dim, scale_log2,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the keys from `start` to `stop`; MASKED where a query may not see all of them."""
    for start_n in range(start, stop, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, keys, stride_k, d, dim, EVEN_D, OPERAND)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # (BLOCK_M, BLOCK_N)
        if MASKED:
            seen = (n < keys)[None, :]
            if IS_CAUSAL:
                seen = seen & (n[None, :] <= last[:, None])
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: keep the sum 0 instead of NaN
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, axis=1)
        v = load_rows(v_ptr, n, keys, stride_v, d, dim, EVEN_D, OPERAND)
        acc = tl.dot(p.to(OPERAND), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_ob, stride_oh, stride_ot, heads, group, queries, keys, dim, scale,
    IS_CAUSAL: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head a program; under a causal mask those that see most keys first."""
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = batch_head // heads, batch_head % heads
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    last = m + keys - queries  # the last key that each query sees under a causal mask

    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, m, queries, stride_qt, d, dim, EVEN_D, OPERAND)
    k_ptr += batch * stride_kb + head // group * stride_kh
    v_ptr += batch * stride_vb + head // group * stride_vh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    scale_log2 = scale * LOG2_E
    full, stop = key_range(block * BLOCK_M, queries, keys, IS_CAUSAL, BLOCK_M, BLOCK_N)
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, 0, full, keys, last, d, dim, scale_log2,
        IS_CAUSAL, False, EVEN_D, BLOCK_N, OPERAND, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, full, stop, keys, last, d, dim, scale_log2,
        IS_CAUSAL, True, EVEN_D, BLOCK_N, OPERAND, PRECISION,
    )  # fmt: skip

    sees_some = (m < queries) & (keys > 0)
    if IS_CAUSAL:
        sees_some = sees_some & (last >= 0)
    out = tl.where(sees_some[:, None], acc / total[:, None], 0.0)
    lse = tl.where(sees_some, (top + tl.log2(total)) * LN_2, float("-inf"))
    store_rows(out_ptr + batch * stride_ob + head * stride_oh, out, m, queries, stride_ot, d, dim)
    tl.store(lse_ptr + batch_head * queries + m, lse, mask=m < queries)


def rows_together(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements along D; copied where they are not."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def heads_inside(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) that lies in memory as (B, T, H, D), so that merging the heads copies nothing."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


def block_d(dim: int) -> int:
    """The head size padded to what tl.dot takes."""
    return max(16, triton.next_power_of_2(dim))


def stages(x: Tensor) -> int:
    """How many tiles are on their way into shared memory: 3 where a multiprocessor has 160 KiB and more of it, 2 elsewhere."""
    return 3 if architecture(x) % 10 == 0 else 2


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The op's forward.

    Args:
        query: (B, H, Tq, D), any strides (copied where D's is not 1).
        key, value: (B, H_kv, Tk, D) of the query's dtype; H is a multiple of H_kv.

    Returns:
        out (B, H, Tq, D) of the query's dtype, in memory (B, Tq, H, D); lse (B, H, Tq) float32.
    """
    q, k, v = rows_together(query), rows_together(key), rows_together(value)
    out = heads_inside(q)
    batch, heads, queries, dim = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    width = block_d(dim)
    block_m, block_n, warps = (TILES_FP32 if q.dtype == torch.float32 else TILES)[width]
    if queries < block_m:  # a decode step or a short prompt: no larger a tile than the queries fill
        block_m = max(16, triton.next_power_of_2(queries))
        warps = min(warps, 4)
    attention_fwd_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], heads, heads // k.shape[1],
        queries, k.shape[2], dim, scale, is_causal, dim == width, block_m, block_n, width, operand(q), dot_precision(q),
        num_warps=warps, num_stages=stages(q),
    )  # fmt: skip
    return out, lse
