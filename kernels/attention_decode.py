"""Attention of a few queries over many keys, split over the keys so that a small batch fills the device (flash-decoding).

The query heads that share a key head, and their queries, are the rows of one tile: keys and values are read once for all of them.
Each program takes one part of the keys of one key head and writes its own softmax's result and log-sum-exp in fp32; a second kernel
weighs the parts in a fixed order. With one part the first kernel writes the result itself.

Sequence b is positions starts[b] to ends[b] of row rows[b] of the cache. All three are read on the device, and the number of parts
comes from shapes alone, so a CUDA graph stays right when they change. Layouts and masks as in attention.py; no dropout, no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_tiles import (
    LN_2,
    LOG2_E,
    NO_LIMIT,
    Options,
    block_d,
    cap_scores,
    heads_inside,
    load_rows,
    rows_together,
    sees,
    stages,
)
from fastgpt.kernels.launch import dot_precision, multiprocessors, operand

__all__ = ["attention_decode", "is_better"]

MAX_ROWS = 64  # rows (queries times heads of a group) of a tile
LEAST_KEYS = 256  # below it the parts are too short for a second kernel
TILES = {
    16: (128, 4),
    32: (128, 4),
    64: (64, 4),
    128: (64, 4),
    256: (32, 4),
}  # (BLOCK_N, warps) by the padded head size
TILES_FP32 = {16: (64, 4), 32: (64, 4), 64: (32, 4), 128: (16, 4), 256: (16, 8)}


@triton.jit(do_not_specialize=["left", "right"])
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, starts_ptr, ends_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, stride_os, stride_ob, stride_oh, stride_ot, batches, heads, group, queries, longest,
    dim, parts, left, right, scale, cap, HAS_ROWS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_ENDS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for BLOCK_M rows of one key head a program."""
    part = tl.program_id(0) % parts
    kv_heads = heads // group
    batch_head = (tl.program_id(0) // parts).to(tl.int64)
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    r = tl.program_id(1) * BLOCK_M + tl.arange(
        0, BLOCK_M
    )  # row r is query r % queries of the group's head r // queries
    head = kv_head * group + r // queries
    query = r % queries
    there = r < group * queries
    d = tl.arange(0, BLOCK_D)

    row, start, end = batch, 0, longest
    if HAS_ROWS:
        row = tl.load(rows_ptr + batch).to(tl.int64)
    if HAS_STARTS:
        start = tl.load(starts_ptr + batch).to(tl.int32)
    if HAS_ENDS:
        end = tl.load(ends_ptr + batch).to(tl.int32)
    keys = end - start
    first_seen, stop_seen = 0, keys  # what any of the queries sees
    if HAS_LEFT:
        first_seen = tl.maximum(keys - queries - left, 0)
    if HAS_RIGHT:
        stop_seen = tl.maximum(tl.minimum(keys, keys + right), 0)
    share = tl.cdiv(tl.cdiv(stop_seen - first_seen, parts), BLOCK_N) * BLOCK_N
    first = first_seen + part * share
    stop = tl.minimum(first + share, stop_seen)
    at = query + keys - queries

    inside = (d < dim)[None, :]
    q_rows = batch * stride_qb + head.to(tl.int64) * stride_qh + query * stride_qt
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=there[:, None] & inside, other=0.0).to(OPERAND)
    k_ptr += row * stride_kb + kv_head * stride_kh + tl.cast(start, tl.int64) * stride_kt
    v_ptr += row * stride_vb + kv_head * stride_vh + tl.cast(start, tl.int64) * stride_vt
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(first, stop, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, stop, stride_kt, d, dim, EVEN_D, OPERAND)
        s, _ = cap_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, SOFTCAP)
        s = tl.where(sees(n[None, :], at[:, None], stop, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, axis=1)
        v = load_rows(v_ptr, n, stop, stride_vt, d, dim, EVEN_D, OPERAND)
        acc = tl.dot(p.to(OPERAND), v, acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    # whether the row sees a key of this part: only then is a total of 0 worth a NaN
    sees_some = (tl.maximum(at - left, first) if HAS_LEFT else first) < (
        tl.minimum(at + right + 1, stop) if HAS_RIGHT else stop
    )
    out = tl.where(sees_some[:, None] if HAS_LEFT or HAS_RIGHT else sees_some, acc / total[:, None], 0.0)
    lse = tl.where(sees_some, (top + tl.log2(total)) * LN_2, float("-inf"))
    out_rows = (
        tl.cast(part, tl.int64) * stride_os + batch * stride_ob + head.to(tl.int64) * stride_oh + query * stride_ot
    )
    tl.store(out_ptr + out_rows[:, None] + d[None, :], out, mask=there[:, None] & inside)
    lse_rows = ((part * batches + batch) * heads + head) * queries + query
    tl.store(lse_ptr + lse_rows, lse, mask=there)


@triton.jit
def attention_decode_sum_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_ot, rows, heads, queries, dim, parts,
    BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The parts (parts, rows, D) of one row (of B H Tq) a program, weighed by exp(lse)."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_PARTS)
    d = tl.arange(0, BLOCK_D)
    all_lse = tl.load(part_lse_ptr + s.to(tl.int64) * rows + row, mask=s < parts, other=float("-inf"))
    top = tl.max(all_lse, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((all_lse - base) * LOG2_E), axis=0)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(parts):
        lse = tl.load(part_lse_ptr + tl.cast(part, tl.int64) * rows + row)
        x = tl.load(part_ptr + (tl.cast(part, tl.int64) * rows + row) * dim + d, mask=d < dim, other=0.0)
        acc += tl.exp2((lse - base) * LOG2_E) * x
    out = tl.where(total == 0.0, 0.0, acc / total)
    batch_head, query = row // queries, row % queries
    out_row = batch_head // heads * stride_ob + batch_head % heads * stride_oh + query * stride_ot
    tl.store(out_ptr + out_row + d, out, mask=d < dim)
    tl.store(lse_ptr + row, base + tl.log2(total) * LN_2)


def is_better(query: Tensor, key: Tensor, options: Options) -> bool:
    """Whether a call of `attention` goes here: few queries over many keys, which would leave most of a device idle there."""
    if options.drops or options.cu_seqlens_q is not None or query.numel() == 0 or key.shape[2] < LEAST_KEYS:
        return False
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return rows <= MAX_ROWS and query.shape[2] <= 16 and query.shape[0] * query.shape[1] < 2 * multiprocessors(query)


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The op `attention_decode` without a gradient, and the log-sum-exp with it.

    Args:
        query: (B, H, Tq, D), any strides (copied where D's is not 1); 1 to 64 queries are what it is for, more are right.
        key, value: (B_cache, H_kv, T_max, D) of the query's dtype; H is a multiple of H_kv.
        rows, starts, ends: (B) int32 or int64, or None; see the module's docstring.
        options: neither dropout nor cu_seqlens.

    Returns:
        out (B, H, Tq, D) of the query's dtype, in memory (B, Tq, H, D); lse (B, H, Tq) float32.
    """
    q, k, v = rows_together(query), rows_together(key), rows_together(value)
    out = heads_inside(q)
    batch, heads, queries, dim = q.shape
    kv_heads, longest = k.shape[1], k.shape[2]
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    width, group = block_d(dim), heads // kv_heads
    block_n, warps = (TILES_FP32 if q.dtype == torch.float32 else TILES)[width]
    block_m = min(max(16, triton.next_power_of_2(group * queries)), 16 if q.dtype == torch.float32 else MAX_ROWS)
    blocks = triton.cdiv(group * queries, block_m)
    parts = triton.cdiv(2 * multiprocessors(q), batch * kv_heads * blocks)
    parts = max(min(parts, triton.cdiv(longest, 2 * block_n)), 1)
    part_out, part_lse, part_strides = out, lse, (0, *out.stride()[:3])
    if parts > 1:
        part_out = torch.empty(parts, *q.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
        part_strides = part_out.stride()[:4]
    has_left, has_right, softcap, _, _ = options.flags(longest)
    attention_decode_kernel[(parts * batch * kv_heads, blocks)](
        q, k, v, rows, starts, ends, part_out, part_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *part_strides, batch,
        heads, group, queries, longest, dim, parts, *options.values()[:4], rows is not None, starts is not None, ends is not None,
        has_left, has_right, softcap, dim == width, block_m, block_n, width, operand(q), dot_precision(q),
        num_warps=warps, num_stages=stages(q), **(NO_LIMIT if q.dtype == torch.float32 else {}),
    )  # fmt: skip
    if parts > 1:
        attention_decode_sum_kernel[(lse.numel(),)](
            part_out, part_lse, out, lse, *out.stride()[:3], lse.numel(), heads, queries, dim, parts,
            triton.next_power_of_2(parts), width, num_warps=1 if width <= 64 else 4,
        )  # fmt: skip
    return out, lse
