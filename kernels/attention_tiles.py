"""What the attention kernels share: tiles in and out of memory, which keys a query sees, the soft cap, the dropout's mask.

Query i of a sequence stands at position p = i + keys - queries (aligned to the bottom right) and sees keys from p - left (HAS_LEFT) to
p + right (HAS_RIGHT; a causal mask is right = 0). With packed sequences (PACKED, from cu_seqlens) i, queries and keys are a sequence's
own, and its first rows are added to the pointers.

The soft cap bends scores to cap tanh(s / cap). Dropout keeps a weight where word e % 4 of philox4x32_10(e // 4, seed) is at least the
threshold, e its place among all weights (B, H, Tq, Tk), as in fastgpt/ops/dropout.py.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning
from fastgpt.kernels.activation import _tanh
from fastgpt.kernels.launch import architecture, dot_precision, operand

__all__ = [
    "ALIGNED",
    "ANY",
    "KEY",
    "LN_2",
    "LOG2_E",
    "MAX_DIM",
    "NONE",
    "NO_LIMIT",
    "Options",
    "block_d",
    "heads_inside",
    "launch_attention",
    "rows_together",
    "stages",
    "tile_for",
]

MAX_DIM = 256

# left to itself ptxas spills a few registers of float32 kernels to fit more of them on a multiprocessor; an option of NVIDIA's only
NO_LIMIT: dict[str, int] = {} if torch.version.hip else {"maxnreg": 255}
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# the arguments by which a measured tile is kept (tuning.py)
KEY = ("heads", "group", "all_queries", "all_keys", "dim", "HAS_LEFT", "HAS_RIGHT", "SOFTCAP", "PACKED", "PRECISION")
FLAGS = ("HAS_LEFT", "HAS_RIGHT", "SOFTCAP", "DROPOUT", "PACKED")

# values of DROPOUT: whether four neighbouring keys share one call of Philox
NONE: tl.constexpr = tl.constexpr(0)
ALIGNED: tl.constexpr = tl.constexpr(1)
ANY: tl.constexpr = tl.constexpr(2)


@triton.jit
def load_rows(ptr, rows, n_rows, stride, d, dim, EVEN_D: tl.constexpr, OPERAND: tl.constexpr):
    """Rows (BLOCK, BLOCK_D) of one head as operands of tl.dot; 0 outside."""
    ptrs = ptr + (rows.to(tl.int64) * stride)[:, None] + d[None, :]
    if EVEN_D:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=(rows < n_rows)[:, None] & (d < dim)[None, :], other=0.0)
    return tile.to(OPERAND)


@triton.jit
def store_rows(ptr, tile, rows, n_rows, stride, d, dim):
    """The opposite of load_rows, rounding to the tensor's type."""
    ptrs = ptr + (rows.to(tl.int64) * stride)[:, None] + d[None, :]
    tl.store(ptrs, tile, mask=(rows < n_rows)[:, None] & (d < dim)[None, :])


@triton.jit
def sequence_rows(index, cu_q_ptr, cu_k_ptr, queries, keys, PACKED: tl.constexpr):
    """(batch, first query, queries, first key, keys) of sequence `index`: of batch 0 where sequences are packed."""
    if PACKED:
        q_start, k_start = tl.load(cu_q_ptr + index).to(tl.int64), tl.load(cu_k_ptr + index).to(tl.int64)
        own_queries = (tl.load(cu_q_ptr + index + 1) - q_start).to(tl.int32)
        own_keys = (tl.load(cu_k_ptr + index + 1) - k_start).to(tl.int32)
        return index * 0, q_start, own_queries, k_start, own_keys
    else:
        return index, index * 0, queries, index * 0, keys


@triton.jit
def key_range(
    first, queries, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """For BLOCK_M queries from `first`: (start, full, stop), multiples of BLOCK_N but for stop. None sees a key before `start` or from
    `stop` on; all see every key from `start` to `full` (with HAS_LEFT full = start: every tile may need a mask)."""
    start, full, stop = 0, keys // BLOCK_N * BLOCK_N, keys
    if HAS_RIGHT:
        full = tl.minimum(tl.maximum(first + keys - queries + right + 1, 0), keys) // BLOCK_N * BLOCK_N
        stop = tl.maximum(tl.minimum(first + BLOCK_M + keys - queries + right, keys), full)
    if HAS_LEFT:
        start = tl.maximum(first + keys - queries - left, 0) // BLOCK_N * BLOCK_N
        full = start
    return start, full, stop


@triton.jit
def sees(n, at, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether keys n are seen from positions `at`; n and at are shaped to broadcast."""
    seen = n < keys
    if HAS_RIGHT:
        seen = seen & (n <= at + right)
    if HAS_LEFT:
        seen = seen & (n >= at - left)
    return seen


@triton.jit
def cap_scores(s, scale, cap_log2, SOFTCAP: tl.constexpr):
    """(scores times log2 e, what the soft cap's slope is made of) from products: `scale` holds log2 e, or with a cap 1 / cap."""
    if SOFTCAP:
        bent = _tanh(s * scale)
        return bent * cap_log2, bent
    else:
        return s * scale, s


@triton.jit
def capped_slope(ds, bent, SOFTCAP: tl.constexpr):
    """The gradient of scores before the cap."""
    if SOFTCAP:
        ds = ds * (1.0 - bent * bent)
    return ds


@triton.jit
def kept(weights, start_n, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr):
    """(BLOCK_M, BLOCK_N) bool: which weights of the keys from start_n on stay; weights (BLOCK_M) int64: where each row's begin."""
    least = threshold.to(tl.uint32)
    if DROPOUT == ALIGNED:  # the tile begins at a multiple of 4 in every row
        count = ((weights + start_n) // 4)[:, None] + tl.arange(0, BLOCK_N // 4)[None, :]
        low, high = count.to(tl.uint32), (count >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N))
    else:
        place = weights[:, None] + (start_n + tl.arange(0, BLOCK_N))[None, :]
        count = place >> 2
        low, high = count.to(tl.uint32), (count >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
        word = (place & 3).to(tl.int32)
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words >= least


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of the ops `attention` and `attention_backward` after scale; see fastgpt/ops/attention.py."""

    is_causal: bool
    scale: float
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

    def sequences(self, query: Tensor, key: Tensor) -> tuple[int, int, int]:
        """How many there are, and the longest of the queries and of the keys."""
        if self.cu_seqlens_q is None:
            return query.shape[0], query.shape[2], key.shape[2]
        return self.cu_seqlens_q.numel() - 1, self.max_seqlen_q, self.max_seqlen_k

    def values(self) -> tuple[Any, ...]:
        """left, right, scale and cap (as `cap_scores` takes them), the dropout's seed, threshold and factor, cu_seqlens."""
        left = max(self.window_left, 0)
        right = 0 if self.is_causal else max(self.window_right, 0)
        capped = self.softcap > 0.0
        scale = self.scale / self.softcap if capped else self.scale * LOG2_E.value
        threshold = min(round(self.dropout_p * 2**32), 2**32 - 1)
        factor = 1.0 / (1.0 - self.dropout_p) if self.drops else 1.0
        seed = self.seed if self.drops else None
        cap = self.softcap * LOG2_E.value
        return left, right, scale, cap, seed, threshold, factor, self.cu_seqlens_q, self.cu_seqlens_k

    def flags(self, keys: int) -> tuple[Any, ...]:
        """HAS_LEFT, HAS_RIGHT, SOFTCAP, DROPOUT, PACKED."""
        packed = self.cu_seqlens_q is not None
        mode = NONE if not self.drops else ALIGNED if keys % 4 == 0 and not packed else ANY
        has_right = self.is_causal or self.window_right >= 0
        return self.window_left >= 0, has_right, self.softcap > 0.0, mode.value, packed


def launch_attention(
    kernel: Any, args: tuple[Any, ...], flags: tuple[Any, ...], grid: Callable[[Mapping[str, int]], tuple[int, ...]], q: Tensor,
    tile: tuple[int, int, int], choices: Sequence[Mapping[str, int]], **limits: int,
) -> None:  # fmt: skip
    """Start one of the tiled kernels on q's head size and types; `flags` are those of `Options`, `limits` num_stages and maxnreg."""
    width = block_d(q.shape[-1])
    constants = dict(zip(FLAGS, flags, strict=True)) | {
        "EVEN_D": q.shape[-1] == width,
        "BLOCK_D": width,
        "OPERAND": operand(q),
        "PRECISION": dot_precision(q),
    }
    named = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "num_warps": tile[2]} | limits
    tuning.launch(kernel, grid, args, named, () if flags[3] else choices, KEY, **constants)


def rows_together(x: Tensor) -> Tensor:
    """The tensor with neighbouring elements along D; copied where they are not."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def heads_inside(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) that lies in memory as (B, T, H, D), so that merging the heads copies nothing."""
    batch, heads, time, dim = x.shape
    return x.new_empty(batch, time, heads, dim).transpose(1, 2)


def block_d(dim: int) -> int:
    """The head size padded to what tl.dot takes."""
    return max(16, triton.next_power_of_2(dim))


def tile_for(tile: tuple[int, int, int], dropout: int, most: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps), with dropout cut to most x 32 and 8 warps so that Philox's registers find room beside the scores: more
    spills (aot.py), in the backward already with 64 x 32."""
    block_m, block_n, _ = tile
    return tile if dropout == NONE.value else (min(block_m, most), min(block_n, 32), 8)


def stages(x: Tensor) -> int:
    """How many tiles are on their way into shared memory: 3 where a multiprocessor has 160 KiB and more of it, 2 elsewhere."""
    return 3 if architecture(x) % 10 == 0 else 2
