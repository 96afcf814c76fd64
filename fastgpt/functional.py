"""Attention with other libraries' signatures, on `ops.attention`: torch's scaled_dot_product_attention and flash-attn's functions.

    from fastgpt.functional import scaled_dot_product_attention   # in the place of torch.nn.functional's
    from fastgpt.functional import flash_attn_func                # in the place of flash_attn's

What the op does not do (masks, ALiBi; windows on the CPU, where it has no kernel for them) goes to torch's
scaled_dot_product_attention, and says so once a process through the logger "fastgpt".

Signatures: pytorch.org, torch.nn.functional; github.com/Dao-AILab/flash-attention, flash_attn_interface.py.
"""

import functools
import itertools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops

_log = logging.getLogger("fastgpt")
_torch_attention = F.scaled_dot_product_attention


@functools.cache
def _log_once(what: str) -> None:
    _log.warning("attention with %s is computed by torch: the fastgpt op does not support it", what)


def _uncovered(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, gqa: bool
) -> str | None:
    """What of a call of scaled_dot_product_attention the op does not do, or None."""
    if attn_mask is not None:
        return "a mask"
    if not 0.0 <= dropout_p <= 1.0:
        return "a dropout_p that torch judges"
    shapes = (query.shape, key.shape, value.shape)
    if (
        min(map(len, shapes)) < 3
        or len({shape[:-3] for shape in shapes}) > 1
        or len({shape[-1] for shape in shapes}) > 1
    ):
        return "broadcast shapes, or a value of another width"
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if value.shape[-3] != kv_heads or (heads != kv_heads and (not gqa or not kv_heads or heads % kv_heads)):
        return "heads that do not fit"
    if key.shape[-2] != value.shape[-2] or not query.shape[-1] or not query.is_floating_point():
        return "shapes or dtypes that torch judges"
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        return "different dtypes"
    if query.dim() != 4 and query.dtype in (torch.float16, torch.bfloat16):
        return "half types in other than four dimensions"  # torch's formula for them is in fp32: more exact than a kernel in halves
    if is_causal and query.shape[-2] > key.shape[-2]:
        return "fewer keys than queries under a causal mask"
    return None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax(scale * query @ key^T) @ value.

    Args:
        query: (..., H, Tq, D).
        key, value: (..., H_kv, Tk, D); H_kv = H, or with enable_gqa a divisor of it.
        attn_mask: goes to torch.
        dropout_p: the probability of a weight to be dropped, whenever it is not 0, as in torch; the masks are those of `ops.attention`,
            drawn from torch's default generator.
        is_causal: query i sees keys j <= i, aligned to the top left as in torch (`ops.attention` aligns to the bottom right).
        scale: 1 / sqrt(D) where None.

    Returns:
        (..., H, Tq, D) in the query's dtype; accumulated in fp32.

    Raises:
        What torch raises for input that fits neither.

    Example:
        >>> q = torch.randn(2, 4, 8, 16)
        >>> scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 4, 8, 16])
    """
    if what := _uncovered(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        _log_once(what)
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if is_causal:  # keys behind the last query are seen by none; without them both alignments are one
        key, value = key[..., : query.shape[-2], :], value[..., : query.shape[-2], :]
    if query.dim() == 4:
        return ops.attention(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    return ops.attention(q, k, v, is_causal=is_causal, scale=scale, dropout_p=dropout_p).reshape(query.shape)


def _visible(
    query_len: int, key_len: int, causal: bool, window_size: tuple[int, int], device: torch.device
) -> Tensor | None:
    """flash-attn's mask, aligned to the bottom right: (Tq, Tk), True where a key is seen; None where a plain causal flag says it."""
    left, right = window_size
    if left < 0 and right < 0:
        return None
    if causal:
        right = 0
    distance = torch.arange(key_len, device=device) - torch.arange(query_len, device=device)[:, None]
    distance = distance - (key_len - query_len)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _op_is_better(x: Tensor, window_size: tuple[int, int], softcap: float, alibi_slopes: Tensor | None) -> bool:
    """Whether `ops.attention` computes a call: it has no ALiBi, torch no soft cap, and on the CPU a window has no kernel in the op."""
    return alibi_slopes is None and (bool(softcap) or max(window_size) < 0 or x.device.type != "cpu")


def _check_flash(name: str, softcap: float, slopes: Tensor | None, probabilities: bool, **tensors: Tensor) -> None:
    for argument, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, expected (B, T, H, D)")
    if softcap and slopes is not None:
        raise NotImplementedError(f"{name}: softcap is {softcap} with alibi_slopes, expected one of them")
    if probabilities:
        raise NotImplementedError(f"{name}: the probabilities and their logarithms are not returned")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """flash_attn.flash_attn_func.

    Args:
        q: (B, Tq, H, D), any floating dtype.
        k, v: (B, Tk, H_kv, D); H is a multiple of H_kv.
        softmax_scale: 1 / sqrt(D) where None.
        causal: query i sees keys j <= i + Tk - Tq (aligned to the bottom right).
        dropout_p: of the probabilities, by the op's own mask (`ops.attention`).
        window_size, softcap: as in flash-attn; windows on the CPU are computed by torch.
        alibi_slopes: as in flash-attn, computed by torch.
        deterministic: without effect, the op always is.

    Returns:
        (B, Tq, H, D); rows that see no key are 0.

    Raises:
        ValueError: shapes that do not fit. NotImplementedError: softcap with alibi_slopes, return_attn_probs.

    Example:
        >>> q = torch.randn(2, 8, 4, 16)
        >>> flash_attn_func(q, q[:, :, :2], q[:, :, :2], causal=True).shape
        torch.Size([2, 8, 4, 16])
    """
    _check_flash("flash_attn_func", softcap, alibi_slopes, return_attn_probs, q=q, k=k, v=v)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if _op_is_better(q, window_size, softcap, alibi_slopes):
        out = ops.attention(
            query, key, value, is_causal=causal, scale=softmax_scale, dropout_p=dropout_p, window=window_size, softcap=softcap
        )  # fmt: skip
        return out.transpose(1, 2)
    _log_once("a window or ALiBi")
    query_len, key_len = q.shape[1], k.shape[1]
    seen = _visible(query_len, key_len, causal, window_size, q.device)
    if seen is None and causal:
        seen = _visible(query_len, key_len, True, (key_len + query_len, 0), q.device)
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    if alibi_slopes is not None:
        at = torch.arange(key_len, device=q.device) - torch.arange(query_len, device=q.device)[:, None]
        distance = (at - (key_len - query_len)).abs()
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        bias = (-slopes[:, :, None, None] * distance).to(q.dtype)  # (B or 1, H, Tq, Tk)
        mask = bias if mask is None else bias + mask
    out = _torch_attention(
        query, key, value, mask, dropout_p, scale=softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if seen is not None:
        out = torch.where(seen.any(-1)[:, None], out, 0)
    return out.transpose(1, 2)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """flash_attn.flash_attn_qkvpacked_func: `flash_attn_func` of qkv (B, T, 3, H, D), which is read where it is.

    Raises:
        ValueError: another shape; and as `flash_attn_func`.

    Example:
        >>> flash_attn_qkvpacked_func(torch.randn(2, 8, 3, 4, 16)).shape
        torch.Size([2, 8, 4, 16])
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"flash_attn_qkvpacked_func: qkv has shape {tuple(qkv.shape)}, expected (B, T, 3, H, D)")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash_attn.flash_attn_varlen_func: sequences of several lengths one after the other, each attending to itself only.

    Args:
        q: (total_q, H, D); k, v: (total_k, H_kv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1) int32 or int64; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen_q, max_seqlen_k: the longest sequences; queries beyond are not computed on a GPU.
        The rest is as in `flash_attn_func`.

    Returns:
        (total_q, H, D). One call of the op; with ALiBi, or a window or soft cap on the CPU, one a sequence. On a GPU the values of
        cu_seqlens are not looked at.

    Raises:
        ValueError: shapes that do not fit. NotImplementedError: block_table, and as `flash_attn_func`.

    Example:
        >>> q, cu = torch.randn(10, 4, 16), torch.tensor([0, 3, 10])
        >>> flash_attn_varlen_func(q, q, q, cu, cu, 7, 7, causal=True).shape
        torch.Size([10, 4, 16])
    """
    name = "flash_attn_varlen_func"
    if block_table is not None:
        raise NotImplementedError(f"{name}: block_table (a paged cache) is not supported")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.numel() < 1:
        got = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"{name}: cu_seqlens_q and cu_seqlens_k have shapes {got}, expected (B + 1) both")
    plain = max(window_size) < 0 and not softcap
    packed = alibi_slopes is None and (plain or q.device.type != "cpu") and not return_attn_probs
    if packed and q.device.type != "cpu" and q.dim() == k.dim() == v.dim() == 3:
        return _packed(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
        )
    sizes = []
    for argument, x, cu in (("q", q, cu_seqlens_q), ("k", k, cu_seqlens_k), ("v", v, cu_seqlens_k)):
        if x.dim() != 3:
            raise ValueError(f"{name}: {argument} has shape {tuple(x.shape)}, expected (total, H, D)")
        ends: list[int] = cu.tolist()
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != x.shape[0] or min(lengths, default=0) < 0:
            raise ValueError(f"{name}: cu_seqlens of {argument} is {ends}, expected to rise from 0 to {x.shape[0]}")
        sizes.append(lengths)
    if packed and not dropout_p:
        return _packed(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            0.0,
            softmax_scale,
            causal,
            window_size,
            softcap,
        )
    parts = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[2]), strict=True)
    outs = []
    for b, (qs, ks, vs) in enumerate(parts):
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out = flash_attn_func(
            qs[None], ks[None], vs[None], dropout_p, softmax_scale, causal, window_size, softcap, slopes,
            deterministic, return_attn_probs,
        )  # fmt: skip
        outs.append(out[0])
    return torch.cat(outs) if outs else torch.empty_like(q)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest_q: int, longest_k: int, dropout_p: float,
    scale: float | None, causal: bool, window: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """All sequences, (total, H, D), in one call of the op."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, total, D)
    out = ops.attention(
        query, key, value, is_causal=causal, scale=scale, dropout_p=dropout_p, window=window, softcap=softcap,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k), max_seqlens=(longest_q, longest_k),
    )  # fmt: skip
    return out[0].transpose(0, 1)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """flash_attn.flash_attn_with_kvcache: new keys and values go into the cache, then q attends to all of it.

    Args:
        q: (B, Tq, H, D).
        k_cache, v_cache: (B_cache, T_max, H_kv, D); changed in place where k and v are given.
        k, v: (B, T_new, H_kv, D), written from position cache_seqlens on.
        rotary_cos, rotary_sin: (T_rotary, R / 2) tables; q and k turn by their positions' angles before anything else. With causal (or
            a window) query i stands at position cache_seqlens + i, else all of them stand at cache_seqlens.
        cache_seqlens: positions in the cache so far, a number or (B); T_max where None.
        cache_batch_idx: (B), the cache's rows to use; 0 to B - 1 where None.
        cache_leftpad: (B), where each sequence begins in the cache; 0 where None.
        The rest is as in `flash_attn_func`; no gradients.

    Returns:
        (B, Tq, H, D).

    Raises:
        ValueError: shapes that do not fit, or more positions than the cache has (on a GPU this is not looked at where no rotary tables
        are given, so that a CUDA graph can hold the call). NotImplementedError: block_table, softcap with alibi_slopes,
        return_softmax_lse.

    Example:
        >>> cache = torch.zeros(1, 32, 2, 16), torch.zeros(1, 32, 2, 16)
        >>> new = torch.randn(1, 3, 2, 16)
        >>> flash_attn_with_kvcache(torch.randn(1, 3, 4, 16), *cache, new, new, cache_seqlens=5, causal=True).shape
        torch.Size([1, 3, 4, 16])
    """
    name = "flash_attn_with_kvcache"
    _check_flash(name, softcap, alibi_slopes, return_softmax_lse, q=q, k_cache=k_cache, v_cache=v_cache)
    if block_table is not None:
        raise NotImplementedError(f"{name}: block_table (a paged cache) is not supported")
    if (k is None) != (v is None):
        raise ValueError(f"{name}: k and v are given together or not at all")
    if rotary_cos is not None and (k is None or rotary_sin is None):
        raise ValueError(f"{name}: rotary_cos needs rotary_sin, k and v")
    B = q.shape[0]
    if q.device.type != "cpu" and rotary_cos is None and alibi_slopes is None:
        return _step_over_cache(
            q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, softmax_scale, causal, window_size, softcap
        )  # fmt: skip
    rows = list(range(B)) if cache_batch_idx is None else cache_batch_idx.tolist()
    longest = k_cache.shape[1]
    if cache_seqlens is None:
        lengths = [longest] * B
    elif isinstance(cache_seqlens, int):
        lengths = [cache_seqlens] * B
    else:
        lengths = cache_seqlens.tolist()
    starts = [0] * B if cache_leftpad is None else cache_leftpad.tolist()
    new = 0 if k is None else k.shape[1]
    if max(lengths, default=0) + new > longest:
        raise ValueError(f"{name}: {max(lengths)} cached positions and {new} new ones; the cache has {longest}")
    outs = []
    with torch.no_grad():
        for b, (row, length, start) in enumerate(zip(rows, lengths, starts, strict=True)):
            query = q[b : b + 1]
            if k is not None and v is not None:
                key = k[b : b + 1]
                if rotary_cos is not None and rotary_sin is not None:
                    spread = causal or max(window_size) >= 0
                    query = _turned(query, rotary_cos, rotary_sin, length, rotary_interleaved, spread)
                    key = _turned(key, rotary_cos, rotary_sin, length, rotary_interleaved, True)
                k_cache[row, length : length + new] = key[0].to(k_cache.dtype)
                v_cache[row, length : length + new] = v[b].to(v_cache.dtype)
            end = length + new
            slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            keys, values = k_cache[row : row + 1, start:end], v_cache[row : row + 1, start:end]
            outs.append(
                flash_attn_func(
                    query, keys, values, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes=slopes
                )
            )
    return torch.cat(outs)


@torch.no_grad()
def _step_over_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, scale: float | None, causal: bool, window: tuple[int, int],
    softcap: float,
) -> Tensor:  # fmt: skip
    """`flash_attn_with_kvcache` without a look at any value: two indexed copies and one call of `ops.attention_decode`."""
    ends = cache_seqlens
    if isinstance(ends, int):
        ends = torch.full((q.shape[0],), ends, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        if ends is None:
            raise ValueError(
                "flash_attn_with_kvcache: k and v are given without cache_seqlens; the cache has no room for them"
            )
        rows = torch.arange(q.shape[0], device=q.device) if cache_batch_idx is None else cache_batch_idx.long()
        at = ends.long()[:, None] + torch.arange(k.shape[1], device=q.device)
        k_cache.index_put_((rows[:, None], at), k.to(k_cache.dtype))
        v_cache.index_put_((rows[:, None], at), v.to(v_cache.dtype))
        ends = ends + k.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    out = ops.attention_decode(
        query, key, value, rows=cache_batch_idx, starts=cache_leftpad, ends=ends, is_causal=causal, scale=scale, window=window,
        softcap=softcap,
    )  # fmt: skip
    return out.transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, start: int, interleaved: bool, spread: bool) -> Tensor:
    """x (1, T, H, D) turned by the angles of positions from start on, or all by those of start."""
    T = x.shape[1]
    if spread:
        cos, sin = cos[start : start + T], sin[start : start + T]
    else:
        cos, sin = (table[start : start + 1].expand(T, -1) for table in (cos, sin))
    return ops.rope(x.transpose(1, 2), cos, sin, interleaved=interleaved).transpose(1, 2)
