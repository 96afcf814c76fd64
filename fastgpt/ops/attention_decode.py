"""Attention of a few new queries over a cache of keys and values, each sequence at its own place and length. Formula in reference/.

No gradient: it is for generation.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import reference
from fastgpt.ops.attention import _covers, _cpu_into, _empty_like, limits
from fastgpt.ops.backend import define
from fastgpt.ops.reference.attention import cache_slice


def _cpu(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, starts: Tensor | None, ends: Tensor | None, is_causal: bool,
    scale: float, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    _covers(window_left, window_right, softcap, 0.0, False)
    out, lse = _empty_like(query, query.shape), torch.empty(1, *query.shape[1:3])
    for b in range(query.shape[0]):
        row, start, end = cache_slice(b, key.shape[2], rows, starts, ends)
        k, v = (x[row : row + 1, :, start:end] for x in (key, value))
        _cpu_into(out[b : b + 1], lse, query[b : b + 1], k, v, is_causal, scale)
    return out


def _fake(query: Tensor, *_: Any) -> Tensor:
    return _empty_like(query, query.shape)


_attention_decode = define(
    "attention_decode(Tensor query, Tensor key, Tensor value, Tensor? rows, Tensor? starts, Tensor? ends, bool is_causal, float scale,"
    " int window_left=-1, int window_right=-1, float softcap=0.0) -> Tensor",
    fake=_fake,
    reference=reference.attention_decode,
    cpu=_cpu,
)


def attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rows: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """`ops.attention` of query b over positions starts[b] to ends[b] (exclusive) of row rows[b] of a cache; no gradient.

    Args:
        query: (B, H, Tq, D), the newest Tq positions of each sequence.
        key, value: (B_cache, H_kv, T_max, D), the query's dtype, any strides; H is a multiple of H_kv.
        rows, starts, ends: (B) int32 or int64 on the query's device; 0 to B - 1, 0 and T_max where None. 0 <= starts <= ends <= T_max;
            they are not looked at on a GPU, so a captured graph may be run again with others.
        is_causal: query i sees positions up to ends[b] - Tq + i.
        scale, window, softcap: as in `ops.attention`.

    Returns:
        (B, H, Tq, D) in the query's dtype, in memory (B, Tq, H, D). Rows that see nothing are 0.

    Raises:
        TypeError: different dtypes. ValueError: shapes that do not fit, softcap out of range.

    Source:
        Splitting over the keys as in flash-decoding (pytorch.org/blog/flash-decoding).

    >>> q, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 32, 16)
    >>> attention_decode(q, cache, cache, ends=torch.tensor([5, 32])).shape
    torch.Size([2, 4, 1, 16])
    """
    name = "attention_decode"
    for what, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name}: {what} has shape {tuple(x.shape)}, expected (B, H, T, D)")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"{name}: query {query.dtype}, key {key.dtype} and value {value.dtype}, expected one floating dtype"
        )
    if key.shape != value.shape or query.shape[3] != key.shape[3] or query.shape[3] == 0:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(
            f"{name}: query, key and value have shapes {shapes}, expected (B, H, Tq, D), (B_cache, H_kv, T_max, D) twice"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"{name}: {query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads")
    if rows is None and query.shape[0] > key.shape[0]:
        raise ValueError(f"{name}: {query.shape[0]} sequences and a cache of {key.shape[0]} rows")
    for what, index in (("rows", rows), ("starts", starts), ("ends", ends)):
        if index is not None and (index.shape != query.shape[:1] or index.dtype not in (torch.int32, torch.int64)):
            got = f"{index.dtype} of shape {tuple(index.shape)}"
            raise ValueError(f"{name}: {what} is {got}, expected ({query.shape[0]}) int32 or int64")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap is {softcap}, expected 0 (none) or a positive number")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    is_causal, left, right = limits(query.shape[2], key.shape[2], is_causal, window)
    out: Tensor = _attention_decode(query, key, value, rows, starts, ends, is_causal, scale, left, right, softcap)
    return out
