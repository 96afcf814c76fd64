"""Scaled dot-product attention that never stores the Tq x Tk matrix (arXiv 2205.14135). Formula in reference/.

Dropout on the probabilities as in dropout.py; windows, a soft cap, sequences of several lengths; no additive mask. Windows and the soft
cap have kernels in the engine `triton` only: elsewhere the formula takes them, which does store the matrix.
"""

import itertools
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


def _covers(window_left: int, window_right: int, softcap: float, dropout_p: float, packed: bool) -> None:
    """NotCovered for what the C++ kernels do not do."""
    if window_left >= 0 or window_right >= 0:
        raise NotCovered("a window")
    if softcap > 0.0:
        raise NotCovered("a soft cap")
    if packed and dropout_p > 0.0:
        raise NotCovered("dropout with cu_seqlens")


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> list[tuple[slice, slice]]:
    """The rows of each sequence among the queries and among the keys."""
    if cu_seqlens_k is None:
        raise NotCovered("cu_seqlens_q without cu_seqlens_k")
    pairs = (itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
    return [(slice(*rows), slice(*columns)) for rows, columns in zip(*pairs, strict=True)]


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None,
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _covers(window_left, window_right, softcap, dropout_p, cu_seqlens_q is not None)
    out = _empty_like(query, query.shape)
    lse = torch.empty(query.shape[:3], dtype=torch.float32)
    if cu_seqlens_q is None:
        _cpu_into(out, lse, query, key, value, is_causal, scale, dropout_p, seed)
        return out, lse
    for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k):
        part = torch.empty(*query.shape[:2], rows.stop - rows.start)
        _cpu_into(out[:, :, rows], part, query[:, :, rows], key[:, :, columns], value[:, :, columns], is_causal, scale)
        lse[:, :, rows] = part
    return out, lse


def _cpu_into(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> None:  # fmt: skip
    """The kernel of dense sequences, into an `out` of any strides but D's and a contiguous `lse`."""
    from fastgpt.ops import cpu

    code = _code(query, key, value)
    q, k, v = _rows(query), _rows(key), _rows(value)
    batch, heads, queries, dim = q.shape
    cpu.kernels.attention(
        code, q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3], out.data_ptr(),
        out.stride()[:3], lse.data_ptr(), batch, heads, k.shape[1], queries, k.shape[2], dim, scale, is_causal,
        *_dropout(dropout_p, seed), cpu.threads(),
    )  # fmt: skip


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _covers(window_left, window_right, softcap, dropout_p, cu_seqlens_q is not None)
    grads = _fake_backward(grad, query, key, value)
    if cu_seqlens_q is None:
        _cpu_backward_into(grads, grad, query, key, value, out, lse, is_causal, scale, dropout_p, seed)
        return grads
    for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k):
        g, q, o, dq = (x[:, :, rows] for x in (grad, query, out, grads[0]))
        k, v, dk, dv = (x[:, :, columns] for x in (key, value, *grads[1:]))
        _cpu_backward_into((dq, dk, dv), g, q, k, v, o, lse[:, :, rows], is_causal, scale)
    return grads


def _cpu_backward_into(
    grads: tuple[Tensor, Tensor, Tensor], grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    is_causal: bool, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """The kernel of dense sequences, into gradients of any strides but D's."""
    from fastgpt.ops import cpu

    code = _code(query, key, value, grad)
    g, q, k, v, o = _rows(grad), _rows(query), _rows(key), _rows(value), _rows(out)
    dq, dk, dv = grads
    lse = lse.contiguous()
    batch, heads, queries, dim = q.shape
    cpu.kernels.attention_backward(
        code, q.data_ptr(), q.stride()[:3], k.data_ptr(), k.stride()[:3], v.data_ptr(), v.stride()[:3], o.data_ptr(),
        o.stride()[:3], g.data_ptr(), g.stride()[:3], dq.data_ptr(), dq.stride()[:3], dk.data_ptr(), dk.stride()[:3],
        dv.data_ptr(), dv.stride()[:3], lse.data_ptr(), batch, heads, k.shape[1], queries, k.shape[2], dim, scale,
        is_causal, *_dropout(dropout_p, seed), cpu.threads(),
    )  # fmt: skip


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
        seed: Tensor | None = None, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # what most calls do not use is not passed on, as torch's dispatcher does not either
        more: tuple[Any, ...] = ()
        if window_left >= 0 or window_right >= 0 or softcap > 0.0 or cu_seqlens_q is not None:
            more = (window_left, window_right, softcap, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = below_autograd(_attention, query, key, value, is_causal, scale, dropout_p, seed, *more)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, seed, cu_seqlens_q, cu_seqlens_k)
        ctx.options, ctx.more = (is_causal, scale, dropout_p), more
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 14
        *tensors, seed, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        more = (*ctx.more[:3], cu_seqlens_q, cu_seqlens_k, *ctx.more[5:]) if ctx.more else ()
        return *_attention_backward(grad, *tensors, *ctx.options, seed, *more), *(None,) * 11


_OPTIONS = (
    "bool is_causal, float scale, float dropout_p=0.0, Tensor? seed=None, int window_left=-1, int window_right=-1,"
    " float softcap=0.0, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int max_seqlen_q=0, int max_seqlen_k=0"
)
_attention = define(
    f"attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.attention,
    cpu=_cpu,
    autograd=_Rule,
    autocast=True,
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
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
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    max_seqlens: tuple[int, int] | None = None,
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
        window: (left, right): query i sees keys p - left to p + right with p = i + Tk - Tq; a negative one is unlimited, and is_causal
            makes the right one 0. (w, 0) is a sliding window of w + 1 keys.
        softcap: where it is above 0, the scores are softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
        cu_seqlens: two (S + 1) int32 or int64 that rise from 0 to Tq and to Tk: sequence s is the queries and keys from entry s to
            entry s + 1, and attends to itself only; causal and window are aligned in each. B is 1 then.
        max_seqlens: at least the longest sequence of the queries and of the keys; Tq and Tk where it is None. Kernels plan their work
            by it, so smaller is faster; queries beyond it are not computed.

    Returns:
        (B, H, Tq, D) in the query's dtype, laid out so that `.transpose(1, 2).reshape(B, Tq, H * D)` copies nothing. Rows that see
        no key are 0. Under autocast the inputs are cast to its dtype first.

    Raises:
        TypeError: an integer input or different dtypes. ValueError: shapes that do not fit, dropout_p, seed or softcap out of range.

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
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}, expected 0 (none) or a positive number")
    is_causal, left, right = limits(query.shape[2], key.shape[2], is_causal, window)
    more: tuple[Any, ...] = ()
    if cu_seqlens is not None:
        _check_cu_seqlens(query, key, cu_seqlens)
        more = (left, right, softcap, *cu_seqlens, *(max_seqlens or (query.shape[2], key.shape[2])))
    elif max_seqlens is not None:
        raise ValueError("attention: max_seqlens goes with cu_seqlens")
    elif left >= 0 or right >= 0 or softcap > 0.0:
        more = (left, right, softcap)
    out: Tensor = _attention(query, key, value, is_causal, scale, dropout_p, drawn, *more)[0]
    return out


def limits(queries: int, keys: int, is_causal: bool, window: tuple[int, int]) -> tuple[bool, int, int]:
    """is_causal and a window in the one form that ops take: limits that limit nothing are -1, and a right limit of 0 is is_causal."""
    left, right = window
    left = -1 if left >= keys - 1 else max(left, -1)
    if is_causal or right == 0:
        return True, left, -1
    return False, left, -1 if right >= queries - 1 else max(right, -1)


def _check_cu_seqlens(query: Tensor, key: Tensor, cu_seqlens: tuple[Tensor, Tensor]) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"attention: with cu_seqlens B is {query.shape[0]}, expected 1")
    for what, x, cu in (("queries", query, cu_seqlens[0]), ("keys", key, cu_seqlens[1])):
        if (
            cu.dtype not in (torch.int32, torch.int64)
            or cu.dim() != 1
            or cu.shape != cu_seqlens[0].shape
            or not cu.numel()
        ):
            raise ValueError(
                f"attention: cu_seqlens of the {what} is {cu.dtype} of shape {tuple(cu.shape)}, expected (S + 1) int32 or int64,"
                " the same S for both"
            )
        if cu.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU a look at them would wait for it
            ends = cu.tolist()
            if ends[0] != 0 or ends[-1] != x.shape[2] or any(a > b for a, b in itertools.pairwise(ends)):
                raise ValueError(
                    f"attention: cu_seqlens of the {what} is {ends}, expected to rise from 0 to {x.shape[2]}"
                )
