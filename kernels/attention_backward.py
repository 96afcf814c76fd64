"""The gradient of attention in tiles, computing the probabilities again from the forward's lse (arXiv 2205.14135, appendix B.4).

    P = exp(scale * query key^T - lse);   delta = rowsum(dO * O);   dS = P * (dO value^T - delta)
    dV = P^T dO;   dK = scale * dS^T query;   dQ = scale * dS key

Three kernels: delta; dK and dV by a program for each block of keys, which walks over the queries of all heads that share them; dQ by a
program for each block of queries. So no two programs add to the same place, results are the same bits on every run, at the price of
seven matrix products instead of five. Layouts, masks and types as in attention.py. With dropout M, the factors of the weights, dV is
(M P)^T dO and dS is P * (M * dO value^T - delta); the soft cap's slope multiplies dS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning
from fastgpt.kernels.attention_tiles import (
    LOG2_E,
    NO_LIMIT,
    Options,
    block_d,
    cap_scores,
    capped_slope,
    heads_inside,
    kept,
    key_range,
    launch_attention,
    load_rows,
    rows_together,
    sees,
    sequence_rows,
    store_rows,
    tile_for,
)
from fastgpt.kernels.launch import architecture

__all__ = ["attention_backward"]

# (BLOCK_M, BLOCK_N, warps) by the padded head size: dK and dV, then dQ; aot.py shows no spill with them
TILES_KV = {16: (64, 64, 4), 32: (64, 128, 8), 64: (64, 128, 8), 128: (32, 64, 8), 256: (32, 32, 8)}
TILES_KV_MORE = TILES_KV | {
    32: (64, 64, 8),
    64: (32, 64, 8),
}  # with a window or a soft cap, whose values need registers, too
TILES_KV_SM80 = TILES_KV | {64: (32, 128, 8)}
TILES_Q = {16: (128, 64, 4), 32: (64, 64, 4), 64: (128, 64, 8), 128: (64, 64, 8), 256: (32, 32, 8)}
TILES_Q_SM100 = TILES_Q | {128: (64, 32, 8)}
TILES_KV_FP32 = {16: (32, 64, 4), 32: (32, 64, 4), 64: (32, 32, 4), 128: (16, 16, 8), 256: (16, 16, 8)}
TILES_Q_FP32 = {16: (64, 32, 4), 32: (64, 32, 4), 64: (32, 32, 4), 128: (32, 16, 4), 256: (16, 16, 8)}
CHOICES = tuning.candidates(BLOCK_M=(32, 64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))


@triton.jit
def attention_delta_kernel(
    out_ptr, grad_ptr, delta_ptr, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, heads, queries, dim,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) of BLOCK_M queries of one head a program."""
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    out_ptr += batch * stride_ob + head * stride_oh
    grad_ptr += batch * stride_gb + head * stride_gh
    out = load_rows(out_ptr, m, queries, stride_ot, d, dim, False, tl.float32)
    grad = load_rows(grad_ptr, m, queries, stride_gt, d, dim, False, tl.float32)
    tl.store(delta_ptr + batch_head * queries + m, tl.sum(out * grad, axis=1), mask=m < queries)


@triton.jit
def _add_to_keys(
    dk, dv, k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, stride_q, stride_g, start, stop, queries, keys, first, left, right, weights,
    all_keys, d, dim, scale, cap, seed, threshold, factor, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (unscaled) and dV (without the dropout's factor) of one block of keys from the queries `start` to `stop` of one head; scores
    lie transposed."""
    n = first + tl.arange(0, BLOCK_N)
    for start_m in range(start, stop, BLOCK_M):
        m = start_m + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, m, queries, stride_q, d, dim, EVEN_D, OPERAND)
        lse = tl.load(lse_ptr + m, mask=m < queries, other=float("inf"))  # probability 0 below the last query
        s, bent = cap_scores(
            tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, cap, SOFTCAP
        )  # (BLOCK_N, BLOCK_M)
        p = tl.exp2(s - (lse * LOG2_E)[None, :])
        if HAS_LEFT or HAS_RIGHT:
            at = (m + keys - queries)[None, :]
            p = tl.where(sees(n[:, None], at, keys, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        grad = load_rows(grad_ptr, m, queries, stride_g, d, dim, EVEN_D, OPERAND)
        delta = tl.load(delta_ptr + m, mask=m < queries, other=0.0)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        stays = p
        if DROPOUT:
            keep = tl.trans(
                kept(weights + m.to(tl.int64) * all_keys, first, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT)
            )
            stays = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * factor, 0.0)
        dv = tl.dot(stays.to(OPERAND), grad, dv, input_precision=PRECISION)
        ds = capped_slope(p * (dp - delta[None, :]), bent, SOFTCAP)
        dk = tl.dot(ds.to(OPERAND), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["left", "right", "threshold"])
def attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt, heads, group,
    longest, all_queries, all_keys, dim, raw_scale, left, right, scale, cap, seed_ptr, threshold, factor, cu_q_ptr, cu_k_ptr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head a program; both gradients have the strides stride_d*."""
    kv_heads = heads // group
    blocks = tl.cdiv(longest, BLOCK_N)
    sequence_head = (tl.program_id(0) // blocks).to(tl.int64)
    kv_head = sequence_head % kv_heads
    first = tl.program_id(0) % blocks * BLOCK_N  # under a causal mask the first keys are seen most: they start first
    batch, q_start, queries, k_start, keys = sequence_rows(
        sequence_head // kv_heads, cu_q_ptr, cu_k_ptr, all_queries, all_keys, PACKED
    )
    if PACKED and first >= keys:
        return
    n = first + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_ptr += batch * stride_kb + kv_head * stride_kh + k_start * stride_kt
    v_ptr += batch * stride_vb + kv_head * stride_vh + k_start * stride_vt
    k = load_rows(k_ptr, n, keys, stride_kt, d, dim, EVEN_D, OPERAND)
    v = load_rows(v_ptr, n, keys, stride_vt, d, dim, EVEN_D, OPERAND)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    start, stop = 0, queries  # queries outside see none of these keys
    if HAS_RIGHT:
        start = tl.maximum(first - (keys - queries) - right, 0) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        stop = tl.minimum(first + BLOCK_N - (keys - queries) + left, queries)
    for member in range(group):
        head = kv_head * group + member
        q_head = q_ptr + batch * stride_qb + head * stride_qh + q_start * stride_qt
        grad_head = grad_ptr + batch * stride_gb + head * stride_gh + q_start * stride_gt
        rows = (batch * heads + head) * all_queries + q_start
        # one loop that masks every tile: a second one for the tiles that need no mask takes the registers of both, and spills
        dk, dv = _add_to_keys(
            dk, dv, k, v, q_head, grad_head, lse_ptr + rows, delta_ptr + rows, stride_qt, stride_gt, start, stop, queries, keys, first,
            left, right, rows * all_keys + k_start, all_keys, d, dim, scale, cap, seed, threshold, factor, HAS_LEFT, HAS_RIGHT,
            SOFTCAP, DROPOUT, EVEN_D, BLOCK_M, BLOCK_N, OPERAND, PRECISION,
        )  # fmt: skip
    if DROPOUT:
        dv = dv * factor
    out = batch * stride_db + kv_head * stride_dh + k_start * stride_dt
    store_rows(dk_ptr + out, dk * raw_scale, n, keys, stride_dt, d, dim)
    store_rows(dv_ptr + out, dv, n, keys, stride_dt, d, dim)


@triton.jit
def _add_to_queries(
    dq, q, grad, lse2, delta, k_ptr, v_ptr, stride_k, stride_v, start, stop, keys, at, left, right, weights, d, dim, scale, cap, seed,
    threshold, factor, MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (unscaled) of one block of queries from the keys from `start` to `stop`."""
    for start_n in range(start, stop, BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, n, keys, stride_k, d, dim, EVEN_D, OPERAND)
        v = load_rows(v_ptr, n, keys, stride_v, d, dim, EVEN_D, OPERAND)
        s, bent = cap_scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, cap, SOFTCAP
        )  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(s - lse2[:, None])
        if MASKED:
            p = tl.where(sees(n[None, :], at[:, None], keys, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept(weights, start_n, seed, threshold, BLOCK_M, BLOCK_N, DROPOUT), dp * factor, 0.0)
        ds = capped_slope(p * (dp - delta[:, None]), bent, SOFTCAP)
        dq = tl.dot(ds.to(OPERAND), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["left", "right", "threshold"])
def attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt, heads, group, longest,
    all_queries, all_keys, dim, raw_scale, left, right, scale, cap, seed_ptr, threshold, factor, cu_q_ptr, cu_k_ptr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PACKED: tl.constexpr,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head a program; under a causal mask those that see most keys first."""
    blocks = tl.cdiv(longest, BLOCK_M)
    sequence_head = (tl.program_id(0) // blocks).to(tl.int64)
    head = sequence_head % heads
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, q_start, queries, k_start, keys = sequence_rows(
        sequence_head // heads, cu_q_ptr, cu_k_ptr, all_queries, all_keys, PACKED
    )
    if PACKED and block * BLOCK_M >= queries:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = m + keys - queries
    q_ptr += batch * stride_qb + head * stride_qh + q_start * stride_qt
    grad_ptr += batch * stride_gb + head * stride_gh + q_start * stride_gt
    q = load_rows(q_ptr, m, queries, stride_qt, d, dim, EVEN_D, OPERAND)
    grad = load_rows(grad_ptr, m, queries, stride_gt, d, dim, EVEN_D, OPERAND)
    rows = (batch * heads + head) * all_queries + q_start + m
    lse2 = tl.load(lse_ptr + rows, mask=m < queries, other=float("inf")) * LOG2_E
    delta = tl.load(delta_ptr + rows, mask=m < queries, other=0.0)
    k_ptr += batch * stride_kb + head // group * stride_kh + k_start * stride_kt
    v_ptr += batch * stride_vb + head // group * stride_vh + k_start * stride_vt
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    weights = rows * all_keys + k_start
    start, full, stop = key_range(block * BLOCK_M, queries, keys, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    if not HAS_LEFT:
        dq = _add_to_queries(
            dq, q, grad, lse2, delta, k_ptr, v_ptr, stride_kt, stride_vt, start, full, keys, at, left, right, weights, d, dim, scale,
            cap, seed, threshold, factor, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EVEN_D, BLOCK_M, BLOCK_N, OPERAND, PRECISION,
        )  # fmt: skip
    dq = _add_to_queries(
        dq, q, grad, lse2, delta, k_ptr, v_ptr, stride_kt, stride_vt, full, stop, keys, at, left, right, weights, d, dim, scale, cap,
        seed, threshold, factor, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, EVEN_D, BLOCK_M, BLOCK_N, OPERAND, PRECISION,
    )  # fmt: skip
    out = batch * stride_db + head * stride_dh + q_start * stride_dt
    store_rows(dq_ptr + out, dq * raw_scale, m, queries, stride_dt, d, dim)


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value from that of the result, and from the forward's out and lse.

    Args:
        grad, query, out: (B, H, Tq, D); key, value: (B, H_kv, Tk, D); one dtype, any strides (copied where D's is not 1).
        lse: (B, H, Tq) float32.

    Returns:
        dQ, dK, dV of the shapes and dtype of query, key and value, in memory (B, T, H, D).
    """
    g, q, k, v, o = (rows_together(x) for x in (grad, query, key, value, out))
    dq, dk, dv = heads_inside(q), heads_inside(k), heads_inside(v)
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    sequences, longest, longest_keys = options.sequences(q, k)
    if sequences == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    width, exact = block_d(dim), q.dtype == torch.float32
    block_m = max(8, 2048 // width)
    attention_delta_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
        o, g, delta, *o.stride()[:3], *g.stride()[:3], heads, queries, dim, block_m, width, num_warps=4
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3])
    flags = options.flags(keys)
    limit = NO_LIMIT if exact or flags[2] or flags[3] else {}
    longest, longest_keys = max(longest, 1), max(longest_keys, 1)
    sizes = (queries, keys, dim, options.scale, *options.values())
    plain = TILES_KV if architecture(q) >= 90 else TILES_KV_SM80
    halves = TILES_KV_MORE if flags[0] or flags[2] or flags[4] else plain
    block_m, block_n, warps = tile_for((TILES_KV_FP32 if exact else halves)[width], flags[3], 32)
    if exact and flags[4] and width == 256:
        warps = 16  # 8 spill
    args = (q, k, v, g, lse, delta, dk, dv, *strides, *dk.stride()[:3], heads, heads // kv_heads, longest_keys, *sizes)
    launch_attention(
        attention_bwd_kv_kernel, args, flags, lambda tile: (triton.cdiv(longest_keys, tile["BLOCK_N"]) * sequences * kv_heads,), q,
        (block_m, block_n, warps), CHOICES, num_stages=1 if exact and flags[4] and width == 128 else 2, **limit,
    )  # fmt: skip
    tiles = TILES_Q_FP32 if exact else TILES_Q if architecture(q) < 100 else TILES_Q_SM100
    block_m, block_n, warps = tile_for(tiles[width], flags[3], 32)
    if exact and flags[4] and width == 128:
        block_m, warps = 16, 8  # where sequences are packed 32 rows spill
    args = (q, k, v, g, lse, delta, dq, *strides, *dq.stride()[:3], heads, heads // kv_heads, longest, *sizes)
    launch_attention(
        attention_bwd_q_kernel, args, flags, lambda tile: (triton.cdiv(longest, tile["BLOCK_M"]) * sequences * heads,), q,
        (block_m, block_n, warps), CHOICES, num_stages=2, **limit,
    )  # fmt: skip
    return dq, dk, dv
