"""Attention of the engine `cuda`: which kernels of csrc/cuda take a call, and how they are given it.

Up to 16 queries a key head go to `attention_decode` (the three types; the keys split over blocks), the others to one of two sets of
kernels: `attention_sm80` (mma.sync, cp.async; head sizes 32, 64, 96, 128; every chip from compute capability 8.0 on) and
`attention_sm90` (tensor copies and wgmma; head sizes 64 and 128; compute capability 9.0 alone). float16 and bfloat16, causal (aligned
bottom-right) and full, grouped heads, any number of queries and keys; `attention_sm90` also sliding windows, packed sequences and
dropout. Tensors are read where they lie if the last dimension is contiguous and rows begin at multiples of 16 bytes, and copied if not.

The backward of `attention_sm90` has two ways to dQ (csrc/cuda/attention_sm90_backward.cuh): seven products with the same bits every
time, or five with additions in any order. FASTGPT_CUDA_SM90_BACKWARD chooses: `deterministic`, `fast`, or `auto` (`adds_grad_query`).

Nothing here has run on a GPU (see cuda.VERIFIED), and the two sets are switched apart: `attention_sm90` is taken where it is in
VERIFIED or FASTGPT_CUDA_SM90=1 asks for it, `attention_sm80` otherwise.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.attention import _empty_like
from fastgpt.ops.backend import NotCovered, implement
from fastgpt.ops.dropout import threshold

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


def adds_grad_query(longest: int) -> bool:
    """Whether the backward of `attention_sm90` for sequences of at most `longest` keys adds dQ in fp32, in any order.

    `auto`: beyond 2,048 keys, where two products less should outweigh a pass over fp32 sums (not measured yet), unless torch is asked
    for deterministic algorithms.

    >>> adds_grad_query(1024)
    False
    """
    wanted = os.environ.get("FASTGPT_CUDA_SM90_BACKWARD") or "auto"
    if wanted not in ("auto", "fast", "deterministic"):
        raise ValueError(f"FASTGPT_CUDA_SM90_BACKWARD is {wanted!r}, expected auto, fast or deterministic")
    return wanted == "fast" or (
        wanted == "auto" and longest > 2048 and not torch.are_deterministic_algorithms_enabled()
    )


def _covers(scale: float, *tensors: Tensor, wide: bool = False) -> int:
    """The code of the tensors' dtype; NotCovered where no kernel takes the call. `wide`: float32 is taken too."""
    cuda._check(*tensors)
    code = cuda._same_type(*tensors)
    if code == 0 and not wide:
        raise NotCovered("dtype torch.float32; covered are float16 and bfloat16")
    if not scale > 0.0:
        raise NotCovered(f"a scale of {scale}; covered are positive ones")
    if any(x.numel() == 0 for x in tensors):
        raise NotCovered("empty tensors")
    batch, heads, queries, _ = tensors[0].shape
    if max(batch, heads) > 65535 or max(queries, tensors[1].shape[2]) > 2**30:
        raise NotCovered("more than 65535 batches or heads, or 2^30 queries or keys")
    return code


@dataclass(frozen=True)
class _Options:
    """The arguments of the ops after scale."""

    dropout_p: float = 0.0
    seed: Tensor | None = None
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0.0 and self.seed is not None

    @property
    def plain(self) -> bool:
        packed = self.cu_seqlens_q is not None
        return not (self.drops or packed or self.window_left >= 0 or self.window_right >= 0 or self.softcap > 0.0)

    @property
    def sequences(self) -> int:
        """0 where they are not packed."""
        return 0 if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    def check(self, chip: int) -> None:
        """NotCovered for what the kernels of that chip do not do."""
        if self.plain:
            return
        if chip != 90:
            raise NotCovered("dropout, a window, a soft cap or packed sequences outside of attention_sm90")
        if self.softcap > 0.0:
            raise NotCovered("a soft cap")
        if self.dropout_p >= 1.0:
            raise NotCovered("dropout_p = 1")
        if self.cu_seqlens_q is not None and (self.cu_seqlens_k is None or self.sequences == 0):
            raise NotCovered("cu_seqlens of no sequence")
        cuda._check(*(x for x in (self.seed, self.cu_seqlens_q, self.cu_seqlens_k) if x is not None))

    def given(self, queries: int, keys: int) -> tuple[tuple[int | float, ...], list[Tensor]]:
        """What the module's functions take for `options`, and the tensors that have to outlive the launch."""
        offsets = [x.to(torch.int32).contiguous() for x in (self.cu_seqlens_q, self.cu_seqlens_k) if x is not None]
        kept, packed = list(offsets), (0, 0, 0, 0)
        if offsets:
            room = 4 + 2 * (queries // 128 + keys // 128 + 2 * self.sequences)  # Params::plan
            kept.append(torch.empty(room, dtype=torch.int32, device=offsets[0].device))
            packed = (offsets[0].data_ptr(), offsets[1].data_ptr(), self.sequences, kept[-1].data_ptr())
        dropout: tuple[int, int, float] = (0, 0, 1.0)
        if self.drops and self.seed is not None:
            dropout = (self.seed.data_ptr(), threshold(self.dropout_p), 1.0 / (1.0 - self.dropout_p))
        return (self.window_left, self.window_right, *packed, *dropout), kept

    def grad_query_sums(self, query: Tensor, keys: int) -> Tensor | None:
        """Zeros for Params::grad_query_sums, a piece of 64 rows for each head and started 64 queries; None where dQ has a kernel."""
        if not adds_grad_query(self.max_seqlen_k if self.sequences else keys):
            return None
        batch, heads, queries, dim = query.shape
        pieces = queries // 64 + self.sequences if self.sequences else batch * -(-queries // 64)
        return query.new_zeros(pieces * heads * 64 * dim, dtype=torch.float32)


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
    options = _Options(dropout_p, seed, *more)
    decoding = options.plain and is_decoding(query.shape[2], query.shape[1] // key.shape[1])
    code = _covers(scale, query, key, value, wide=decoding)
    chip = chip_for(_capability(query), query.shape[3])
    options.check(chip)
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
        given, _kept = options.given(q.shape[2], k.shape[2])
        cuda._launch("attention", q.device, chip, code, *places, _sizes(q, k), scale, is_causal, given)
    return out, lse


@implement("attention_backward", "cuda")
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = _Options(dropout_p, seed, *more)
    code = _covers(scale, query, key, value, out, grad)
    chip = chip_for(_capability(query), query.shape[3])
    options.check(chip)
    q, k, v, o, g = (_readable(x) for x in (query, key, value, out, grad))
    lse = lse.contiguous()
    dq, dk, dv = (_empty_like(x, x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    places = (*_place(q), *_place(k), *_place(v), *_place(o), lse.data_ptr())
    sums = options.grad_query_sums(q, k.shape[2]) if chip == 90 else None
    scratch = (delta.data_ptr(), 0 if sums is None else sums.data_ptr())
    grads = (*_place(g), *_place(dq), *_place(dk), *_place(dv), *scratch)
    given, _kept = options.given(q.shape[2], k.shape[2])
    cuda._launch("attention_backward", q.device, chip, code, *places, _sizes(q, k), scale, is_causal, given, *grads)
    return dq, dk, dv
