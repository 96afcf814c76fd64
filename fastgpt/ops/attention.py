"""Scaled dot-product attention that never stores the Tq x Tk matrix (arXiv 2205.14135). Formula in reference/.

Dropout on the probabilities as in dropout.py; no additive mask.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define
from fastgpt.ops.dropout import draw_seed, threshold


def _rows(x: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor, shape: torch.Size) -> Tensor:
    """(B, H, T, D) in memory as (B, T, H, D), so that merging the heads copies nothing."""
    batch, heads, time, dim = shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int, float]:
    """What the kernels take: the key, the threshold (0: no dropout) and the factor of what is kept."""
    if seed is None or dropout_p == 0.0:
        return 0, 0, 1.0
    if dropout_p >= 1.0:
        raise NotCovered("dropout_p = 1")
    return int(seed) & (2**64 - 1), threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from fastgpt.ops import cpu

    code = _code(query, key, value)
    q, k, v = _rows(query), _rows(key), _rows(value)
    out = _empty_like(q, q.shape)
    batch, heads, queries, dim = q.shape
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    cpu.kernels.attention(
        code, q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3], out.data_ptr(),
        out.stride()[:3], lse.data_ptr(), batch, heads, k.shape[1], queries, k.shape[2], dim, scale, is_causal,
        *_dropout(dropout_p, seed), cpu.threads(),
    )  # fmt: skip
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastgpt.ops import cpu

    code = _code(query, key, value, grad)
    g, q, k, v, o = _rows(grad), _rows(query), _rows(key), _rows(value), _rows(out)
    dq, dk, dv = _empty_like(q, q.shape), _empty_like(k, k.shape), _empty_like(v, v.shape)
    batch, heads, queries, dim = q.shape
    cpu.kernels.attention_backward(
        code, q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3], o.data_ptr(),
        o.stride()[:3], g.data_ptr(), g.stride()[:3], dq.data_ptr(), dq.stride()[:3], dk.data_ptr(), dk.stride()[:3],
        dv.data_ptr(), dv.stride()[:3], lse.contiguous().data_ptr(), batch, heads, k.shape[1], queries, k.shape[2], dim, scale,
        is_causal, *_dropout(dropout_p, seed), cpu.threads(),
    )  # fmt: skip
    return dq, dk, dv


def _code(*tensors: Tensor) -> int:
    from fastgpt.ops import cpu

    codes = {cpu.dtype_code(x) for x in tensors}
    if len(codes) > 1:
        raise NotCovered(f"mixed dtypes {[x.dtype for x in tensors]}")
    return codes.pop()


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty_like(query, query.shape), query.new_empty(query.shape[:3], dtype=wide)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query, query.shape), _empty_like(key, key.shape), _empty_like(value, value.shape)


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = below_autograd(_attention, query, key, value, is_causal, scale, dropout_p, seed)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, seed)
        ctx.options = is_causal, scale, dropout_p
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *tensors, seed = ctx.saved_tensors
        return *_attention_backward(grad, *tensors, *ctx.options, seed), None, None, None, None


_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale, float dropout_p=0.0, Tensor? seed=None)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.attention,
    cpu=_cpu,
    autograd=_Rule,
    autocast=True,
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, bool is_causal, float scale,"
    " float dropout_p=0.0, Tensor? seed=None) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference.attention_backward,
    cpu=_cpu_backward,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T) @ value for each head, in tiles, accumulated in fp32 (fp64 for fp64).

    Args:
        query: (B, H, Tq, D), any strides; fastest with a contiguous D. Any floating dtype.
        key, value: (B, H_kv, Tk, D), the query's dtype; H is a multiple of H_kv, and H / H_kv neighbouring heads share a key head.
        is_causal: query i sees keys j <= i + Tk - Tq (aligned to the bottom right, so that new queries see a whole KV cache;
            torch's scaled_dot_product_attention aligns to the top left). With Tq = 2, Tk = 4 (x: seen)

                x x x .
                x x x x

        scale: 1 / sqrt(D) where it is None.
        dropout_p: probability of a weight to be dropped after the softmax, 0 to 1; the others are divided by 1 - dropout_p. Pass 0 in
            evaluation, as with torch's scaled_dot_product_attention. Not stored: the backward makes the mask again.
        seed: as in `ops.dropout`; weight (b, h, i, j) is element ((b H + h) Tq + i) Tk + j of its mask.

    Returns:
        (B, H, Tq, D) in the query's dtype, laid out so that `.transpose(1, 2).reshape(B, Tq, H * D)` copies nothing. Rows that see
        no key are 0. Under autocast the inputs are cast to its dtype first.

    Raises:
        TypeError: an integer input or different dtypes. ValueError: shapes that do not fit, dropout_p or seed out of range.

    >>> q = torch.randn(1, 4, 8, 16); k = v = torch.randn(1, 2, 8, 16)
    >>> attention(q, k, v, is_causal=True).shape
    torch.Size([1, 4, 8, 16])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, expected (B, H, T, D)")
        if not x.is_floating_point():
            raise TypeError(f"attention: {name} has dtype {x.dtype}, expected a floating-point dtype")
    if key.shape != value.shape:
        raise ValueError(f"attention: key {tuple(key.shape)} and value {tuple(value.shape)} differ in shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"attention: query {tuple(query.shape)} and key {tuple(key.shape)} differ in B or D")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"attention: {query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads")
    if not torch.is_autocast_enabled(query.device.type) and not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"attention: query {query.dtype}, key {key.dtype} and value {value.dtype} differ in dtype")
    if query.shape[3] == 0:
        raise ValueError("attention: the head size D is 0")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected 0 to 1")
    drawn = draw_seed("attention", seed, query.device) if dropout_p > 0.0 else None
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    out: Tensor = _attention(query, key, value, is_causal, scale, dropout_p, drawn)[0]
    return out
