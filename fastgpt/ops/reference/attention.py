"""Scaled dot-product attention, arXiv 1706.03762, equation 1; windows as in 2004.05150, the soft cap of 2408.00118, section 2."""

import math

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide
from fastgpt.ops.reference.dropout import dropout_mask


def visible(
    queries: int, keys: int, is_causal: bool, window_left: int, window_right: int, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, device: torch.device,
) -> Tensor:  # fmt: skip
    """(queries, keys) bool, True where query i may see key j: p - window_left <= j <= p + window_right with p = i + keys - queries
    (aligned to the bottom right; a negative window is unlimited, is_causal limits it to 0 on the right). With cu_seqlens, i and j count
    within their sequence, its own lengths stand for queries and keys, and other sequences are not seen."""
    i, j = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None, :]
    distance, seen = j - i - (keys - queries), torch.ones(queries, keys, dtype=torch.bool, device=device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        ends_q, ends_k = cu_seqlens_q.long()[1:], cu_seqlens_k.long()[1:]
        sequence = torch.searchsorted(ends_q, i, right=True)  # (queries, 1): the first whose end lies behind the row
        seen = sequence == torch.searchsorted(ends_k, j, right=True)
        # counted from the ends of a sequence, both alignments are one
        distance = (j - ends_k[sequence]) - (i - ends_q[sequence]) if ends_q.numel() else distance
    if is_causal or window_right >= 0:
        seen = seen & (distance <= (0 if is_causal else window_right))
    return seen & (distance >= -window_left) if window_left >= 0 else seen


def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(s) value with s = scale * query key^T (softcap tanh(s / softcap) where that is not 0) over the visible keys, and the
    log-sum-exp of the scores (B, H, Tq); rows that see nothing are 0 and -inf."""
    mask = (is_causal, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
    p, lse, _ = _probabilities(query, key, scale, softcap, *mask)
    o = (p * _dropout_factor(p, dropout_p, seed)) @ _repeat(value, query.shape[1])
    return o.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dV = (M P)^T dO; dS = P (M dO V^T - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q (arXiv 2205.14135, appendix B.4), M
    the dropout's factors; dS times the soft cap's slope 1 - tanh^2."""
    heads, kv_heads = query.shape[1], key.shape[1]
    do = wide(grad)
    mask = (is_causal, window_left, window_right, cu_seqlens_q, cu_seqlens_k)
    p, _, slope = _probabilities(query, key, scale, softcap, *mask)
    m = _dropout_factor(p, dropout_p, seed)
    dv = (m * p).transpose(-1, -2) @ do
    dp = do @ _repeat(value, heads).transpose(-1, -2)
    ds = scale * p * (m * dp - (do * ((m * p) @ _repeat(value, heads))).sum(-1, keepdim=True)) * slope
    dq = ds @ _repeat(key, heads)
    dk = ds.transpose(-1, -2) @ wide(query)
    dk, dv = (g.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) if heads != kv_heads else g for g in (dk, dv))
    layout = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in (dq, dk, dv)]
    return layout[0].to(query.dtype), layout[1].to(key.dtype), layout[2].to(value.dtype)


def attention_decode(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, starts: Tensor | None, ends: Tensor | None, is_causal: bool,
    scale: float, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """`attention` of query b over positions starts[b] to ends[b] of row rows[b] of a cache."""
    outs = []
    for b in range(query.shape[0]):
        row, start, end = cache_slice(b, key.shape[2], rows, starts, ends)
        k, v = (x[row : row + 1, :, start:end] for x in (key, value))
        options = (is_causal, scale, 0.0, None, window_left, window_right, softcap)
        outs.append(attention(query[b : b + 1], k, v, *options)[0])
    out = torch.cat(outs) if outs else torch.zeros_like(query)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def cache_slice(
    b: int, longest: int, rows: Tensor | None, starts: Tensor | None, ends: Tensor | None
) -> tuple[int, int, int]:
    """Where sequence b lies in a cache: its row, the first position and the one after the last."""
    row = b if rows is None else int(rows[b])
    return row, 0 if starts is None else int(starts[b]), longest if ends is None else int(ends[b])


def _dropout_factor(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """0 where a weight is dropped, 1 / (1 - dropout_p) elsewhere."""
    if seed is None or dropout_p == 0.0:
        return 1.0
    return dropout_mask(p.shape, seed, dropout_p) / (1 - dropout_p) if dropout_p < 1.0 else 0.0


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Each of the H_kv heads for the heads // H_kv query heads that share it, in the formulas' type."""
    return wide(x) if x.shape[1] == heads else wide(x).repeat_interleave(heads // x.shape[1], 1)


def _probabilities(
    query: Tensor, key: Tensor, scale: float, softcap: float, is_causal: bool, window_left: int, window_right: int,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
    """softmax(s), its log-sum-exp, and the slope of the soft cap."""
    heads = query.shape[1]
    scores = scale * (wide(query) @ _repeat(key, heads).transpose(-1, -2))  # (B, H, Tq, Tk)
    slope: Tensor | float = 1.0
    if softcap > 0.0:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1.0 - bent.square()
    sees_some = torch.full(scores.shape[-2:-1], scores.shape[-1] > 0, device=scores.device)
    if is_causal or window_left >= 0 or window_right >= 0 or cu_seqlens_q is not None:
        queries, keys = scores.shape[-2:]
        seen = visible(queries, keys, is_causal, window_left, window_right, cu_seqlens_q, cu_seqlens_k, scores.device)
        scores = scores.masked_fill(~seen, -math.inf)
        sees_some = seen.any(-1)
    lse = torch.logsumexp(scores, -1)
    p = torch.where(sees_some[:, None], torch.exp(scores - lse[..., None]), 0.0)
    return p, torch.where(sees_some, lse, -math.inf), slope
