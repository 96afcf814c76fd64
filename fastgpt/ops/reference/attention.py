"""Scaled dot-product attention, arXiv 1706.03762, equation 1."""

import math

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide
from fastgpt.ops.reference.dropout import dropout_mask
from fastgpt.ops.reference.softmax import causal_mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value, and the log-sum-exp of the scores (B, H, Tq); rows that see nothing are 0 and -inf."""
    p, lse = _probabilities(query, key, is_causal, scale)
    o = (p * _dropout_factor(p, dropout_p, seed)) @ _repeat(value, query.shape[1])
    return o.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dV = (M P)^T dO; dS = P (M dO V^T - rowsum(dO O)); dQ = scale dS K; dK = scale dS^T Q (arXiv 2205.14135, appendix B.4), M
    the dropout's factors."""
    heads, kv_heads = query.shape[1], key.shape[1]
    do = wide(grad)
    p, _ = _probabilities(query, key, is_causal, scale)
    m = _dropout_factor(p, dropout_p, seed)
    dv = (m * p).transpose(-1, -2) @ do
    dp = do @ _repeat(value, heads).transpose(-1, -2)
    ds = scale * p * (m * dp - (do * ((m * p) @ _repeat(value, heads))).sum(-1, keepdim=True))
    dq = ds @ _repeat(key, heads)
    dk = ds.transpose(-1, -2) @ wide(query)
    dk, dv = (g.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) if heads != kv_heads else g for g in (dk, dv))
    layout = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in (dq, dk, dv)]
    return layout[0].to(query.dtype), layout[1].to(key.dtype), layout[2].to(value.dtype)


def _dropout_factor(p: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """0 where a weight is dropped, 1 / (1 - dropout_p) elsewhere."""
    if seed is None or dropout_p == 0.0:
        return 1.0
    return dropout_mask(p.shape, seed, dropout_p) / (1 - dropout_p) if dropout_p < 1.0 else 0.0


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Each of the H_kv heads for the heads // H_kv query heads that share it, in the formulas' type."""
    return wide(x) if x.shape[1] == heads else wide(x).repeat_interleave(heads // x.shape[1], 1)


def _probabilities(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    scores = scale * (wide(query) @ _repeat(key, heads).transpose(-1, -2))  # (B, H, Tq, Tk)
    sees_some = torch.full(scores.shape[-2:-1], scores.shape[-1] > 0, device=scores.device)
    if is_causal:
        seen = causal_mask(scores.shape[-2], scores.shape[-1], scores.device)
        scores = scores.masked_fill(~seen, -math.inf)
        sees_some = seen.any(-1)
    lse = torch.logsumexp(scores, -1)
    p = torch.where(sees_some[:, None], torch.exp(scores - lse[..., None]), 0.0)
    return p, torch.where(sees_some, lse, -math.inf)
