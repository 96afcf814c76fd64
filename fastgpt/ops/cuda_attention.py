"""Attention of the engine `cuda`: which kernels of csrc/cuda take a call, and how they are given it.

Up to 16 queries a key head go to `attention_decode` (the three types; the keys split over blocks), the others to one of two sets of
kernels: `attention_sm80` (mma.sync, cp.async; head sizes 32, 64, 96, 128; every chip from compute capability 8.0 on) and
`attention_sm90` (tensor copies and wgmma; head sizes 64 and 128; compute capability 9.0 alone). float16 and bfloat16, causal (aligned
bottom-right) and full, grouped heads, any number of queries and keys. Tensors are read where they lie if the last dimension is
contiguous and rows begin at multiples of 16 bytes, and copied if not.

Nothing here has run on a GPU (see cuda.VERIFIED), and the two sets are switched apart: `attention_sm90` is taken where it is in
VERIFIED or FASTGPT_CUDA_SM90=1 asks for it, `attention_sm80` otherwise.
"""

import os
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.attention import _empty_like
from fastgpt.ops.backend import NotCovered, implement

SM80_DIMS, SM90_DIMS = (32, 64, 96, 128), (64, 128)


def chip_for(capability: tuple[int, int], dim: int) -> int:
    """The set of kernels, 80 or 90, that takes attention of head size `dim` on a device of that compute capability.

    Raises:
        NotCovered: a head size that neither has.

    >>> chip_for((8, 6), 96)
    80
    """
    if dim not in SM80_DIMS:
        raise NotCovered(f"a head size of {dim}; covered are {', '.join(map(str, SM80_DIMS))}")
    wanted = "attention_sm90" in cuda.VERIFIED or os.environ.get("FASTGPT_CUDA_SM90", "0") not in ("", "0")
    return 90 if wanted and capability == (9, 0) and dim in SM90_DIMS else 80


def is_decoding(queries: int, group: int) -> bool:
    """Whether the kernel for a few queries takes a call: each of its blocks reads K and V for up to four rows, so that with many
    rows they are read many times, where the tensor cores read them once for 128.

    >>> is_decoding(1, 8), is_decoding(1024, 1)
    (True, False)
    """
    return queries * group <= 16


def decode_splits(keys: int, blocks: int, multiprocessors: int) -> tuple[int, int]:
    """Parts that the keys are split into, and keys a part (a multiple of 64, at least 256 where there are several parts).

    Enough parts for four blocks of 128 threads a multiprocessor, `blocks` being the blocks of one part, and no more than that: each
    part is one more to merge.

    >>> decode_splits(4096, 12, 132)
    (16, 256)
    """
    wanted = max(1, -(-4 * multiprocessors // blocks))
    part = max(256, -(-keys // wanted))
    part = -(-part // 64) * 64
    return -(-keys // part), part


def _readable(x: Tensor) -> Tensor:
    """The tensor, or a copy of it where its rows cannot be read 16 bytes at a time."""
    strides = x.stride()
    if strides[3] == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides[:3]):
        return x
    return x.contiguous()


def _covers(scale: float, dropout_p: float, *tensors: Tensor, wide: bool = False) -> int:
    """The code of the tensors' dtype; NotCovered where no kernel takes the call. `wide`: float32 is taken too."""
    cuda._check(*tensors)
    code = cuda._same_type(*tensors)
    if code == 0 and not wide:
        raise NotCovered("dtype torch.float32; covered are float16 and bfloat16")
    if dropout_p > 0.0:
        raise NotCovered("dropout")
    if not scale > 0.0:
        raise NotCovered(f"a scale of {scale}; covered are positive ones")
    if any(x.numel() == 0 for x in tensors):
        raise NotCovered("empty tensors")
    batch, heads, queries, _ = tensors[0].shape
    if max(batch, heads) > 65535 or max(queries, tensors[1].shape[2]) > 2**30:
        raise NotCovered("more than 65535 batches or heads, or 2^30 queries or keys")
    return code


def _plain(more: tuple[Any, ...]) -> None:
    """NotCovered where the op's arguments after seed ask for anything."""
    if more and more != (-1, -1, 0.0, None, None, 0, 0)[: len(more)]:
        raise NotCovered("a window, a soft cap or packed sequences")


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int, int]:
    batch, heads, queries, dim = query.shape
    return batch, heads, key.shape[1], queries, key.shape[2], dim


def _place(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


@implement("attention", "cuda")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *more: Any,
) -> tuple[Tensor, Tensor]:
    _plain(more)
    decoding = is_decoding(query.shape[2], query.shape[1] // key.shape[1])
    code = _covers(scale, dropout_p, query, key, value, wide=decoding)
    chip = chip_for(_capability(query), query.shape[3])
    q, k, v = _readable(query), _readable(key), _readable(value)
    out = _empty_like(q, q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    places = (*_place(q), *_place(k), *_place(v), *_place(out), lse.data_ptr())
    if decoding:
        batch, heads, kv_heads, queries, keys, dim = _sizes(q, k)
        splits, part = decode_splits(keys, batch * kv_heads * -(-heads // kv_heads * queries // 4), _multiprocessors(q))
        scratch = q.new_empty(splits * lse.numel() * (dim + 1) if splits > 1 else 0, dtype=torch.float32)
        parts = (splits, part, scratch.data_ptr(), scratch.data_ptr() + 4 * splits * lse.numel() * dim)
        cuda._launch("attention_decode", q.device, code, *places, _sizes(q, k), scale, is_causal, *parts)
    else:
        cuda._launch("attention", q.device, chip, code, *places, _sizes(q, k), scale, is_causal)
    return out, lse


@implement("attention_backward", "cuda")
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _plain(more)
    code = _covers(scale, dropout_p, query, key, value, out, grad)
    chip = chip_for(_capability(query), query.shape[3])
    q, k, v, o, g = (_readable(x) for x in (query, key, value, out, grad))
    lse = lse.contiguous()
    dq, dk, dv = (_empty_like(x, x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    places = (*_place(q), *_place(k), *_place(v), *_place(o), lse.data_ptr())
    grads = (*_place(g), *_place(dq), *_place(dk), *_place(dv), delta.data_ptr())
    cuda._launch("attention_backward", q.device, chip, code, *places, _sizes(q, k), scale, is_causal, *grads)
    return dq, dk, dv
