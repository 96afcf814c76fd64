"""AdamW (arXiv 1711.05101, algorithm 2) over all parameters in one launch, and the norm of all gradients.

A program finds its tensor and its place in it in two tables: the tensors' addresses, and a (tensor, block) pair a program. They are
made once for a list of tensors and kept on the device, so that a step copies nothing there and a CUDA graph may hold it. Clipping is a
factor of the gradients; decay, the shadow copies and the zeroed gradients are part of the same pass: 28 bytes a parameter are moved,
30 with a shadow of two bytes, 4 more with zeroing. Computed in fp32, the constants of a step in Python's floats.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.ops.graphs import hold

__all__ = ["adamw", "grad_norm"]

BLOCK = 2048  # elements a program
_KEPT_TABLES = 16  # lists of tensors whose tables are kept

_SHADOWS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointer(place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that lies at `place`; known to be a multiple of 16 bytes where ALIGNED."""
    pointer = tl.load(place).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    here, tensors, i, inside, rate_decay, step_size, beta1, beta2, root_correction, eps, grad_scale,
    HAS_SHADOW: tl.constexpr, SHADOW: tl.constexpr, ZEROES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The elements i of one tensor, those that are `inside`; None is all of them."""
    p_ptr = _pointer(here, tl.float32, ALIGNED) + i
    g_ptr = _pointer(here + tensors, tl.float32, ALIGNED) + i
    m_ptr = _pointer(here + 2 * tensors, tl.float32, ALIGNED) + i
    v_ptr = _pointer(here + 3 * tensors, tl.float32, ALIGNED) + i
    g = tl.load(g_ptr, mask=inside) * grad_scale
    m = tl.load(m_ptr, mask=inside)
    v = tl.load(v_ptr, mask=inside)
    m += (g - m) * (1.0 - beta1)
    v = v * beta2 + (1.0 - beta2) * g * g
    p = tl.load(p_ptr, mask=inside) * (1.0 - rate_decay) - step_size * m / (tl.sqrt_rn(v) / root_correction + eps)
    tl.store(p_ptr, p, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if HAS_SHADOW:
        tl.store(_pointer(here + 4 * tensors, SHADOW, ALIGNED) + i, p.to(SHADOW), mask=inside)
    if ZEROES:
        tl.store(g_ptr, tl.zeros_like(g), mask=inside)


@triton.jit
def adamw_kernel(
    addresses_ptr, programs_ptr, decays_ptr, tensors, step_size, rate, beta1, beta2, root_correction, eps, grad_scale,
    HAS_SHADOW: tl.constexpr, SHADOW: tl.constexpr, ZEROES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N elements of one tensor. addresses: (6, tensors) int64: parameters, gradients, both moments, shadows, sizes."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + 2 * pid)
    first = tl.load(programs_ptr + 2 * pid + 1) * BLOCK_N
    here = addresses_ptr + tensor
    size = tl.load(here + 5 * tensors)
    rate_decay = rate * tl.load(decays_ptr + tensor)
    i = first + tl.arange(0, BLOCK_N)
    if first + BLOCK_N <= size:  # without a mask, whose end may lie anywhere: 16 bytes an access
        _update(
            here, tensors, i, None, rate_decay, step_size, beta1, beta2, root_correction, eps, grad_scale,
            HAS_SHADOW, SHADOW, ZEROES, ALIGNED,
        )  # fmt: skip
    else:
        _update(
            here, tensors, i, i < size, rate_decay, step_size, beta1, beta2, root_correction, eps, grad_scale,
            HAS_SHADOW, SHADOW, ZEROES, ALIGNED,
        )  # fmt: skip


@triton.jit
def square_sum_kernel(
    addresses_ptr, programs_ptr, sums_ptr, tensors, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The sum of squares of BLOCK_N elements, in fp64: a square of an fp32 number is exact there and cannot overflow."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + 2 * pid)
    first = tl.load(programs_ptr + 2 * pid + 1) * BLOCK_N
    size = tl.load(addresses_ptr + tensor + tensors)
    g_ptr = _pointer(addresses_ptr + tensor, tl.float32, ALIGNED)
    i = first + tl.arange(0, BLOCK_N)
    if first + BLOCK_N <= size:
        g = tl.load(g_ptr + i).to(tl.float64)
        tl.store(sums_ptr + pid, tl.sum(g * g, axis=0))
    else:
        g = tl.load(g_ptr + i, mask=i < size, other=0.0).to(tl.float64)
        tl.store(sums_ptr + pid, tl.sum(g * g, axis=0))


@functools.lru_cache(_KEPT_TABLES)
def _table(rows: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows + 1, tensors) int64: the addresses and below them the sizes."""
    return torch.tensor([*rows, sizes], dtype=torch.int64).to(device)


@functools.lru_cache(_KEPT_TABLES)
def _programs(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(programs, 2) int64: each program's tensor and block. Apart from the addresses, which change where gradients are made anew at
    each step: a model of 124M parameters has 60,000 programs."""
    blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes], dtype=torch.int64)
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    firsts = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    return torch.stack((tensors, torch.arange(len(tensors)) - firsts), dim=1).to(device)


def _tables(rows: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return _table(rows, sizes, device), _programs(sizes, device)


@functools.lru_cache(_KEPT_TABLES)
def _decays(decays: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(decays, dtype=torch.float32).to(device)


def _addresses(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[int, ...]:
    """Where the tensors lie, 0 for those that are not there; on meta tensors, for the compile without a GPU, all are 0."""
    return tuple(x.data_ptr() if x.device.type != "meta" else 0 for x in tensors) or (0,) * len(like)


def _aligned(rows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether all tensors begin at multiples of 16 bytes: torch's own do, views may not."""
    return all(address % 16 == 0 for row in rows for address in row)


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(x.numel() for x in tensors)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together: contiguous float32 tensors; a float64 scalar on the CPU, the same at every run."""
    device = grads[0].device
    rows = (_addresses(grads, grads),)
    table, programs = _tables(rows, _sizes(grads), device)
    hold(table, programs)
    sums = torch.zeros(max(len(programs), 1), dtype=torch.float64, device=device)
    if len(programs):
        square_sum_kernel[(len(programs),)](table, programs, sums, len(grads), _aligned(rows), BLOCK, num_warps=8)
    return sums.sum().sqrt() if device.type == "meta" else sums.sum().sqrt().cpu()


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
    step: int,
    shadows: Sequence[Tensor],
    zero_grads: bool,
) -> None:
    """The op's update, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: contiguous float32 tensors.
        shadows: none, or a contiguous copy of each parameter, all float16 or all bfloat16.
    """
    device = params[0].device
    rows = tuple(_addresses(tensors, params) for tensors in (params, grads, exp_avgs, exp_avg_sqs, shadows))
    table, programs = _tables(rows, _sizes(params), device)
    if len(programs) == 0:
        return
    decays = _decays(tuple(weight_decays), device)
    hold(table, programs, decays)
    kind = _SHADOWS[shadows[0].dtype] if shadows else tl.bfloat16
    adamw_kernel[(len(programs),)](
        table, programs, decays, len(params), lr / (1 - beta1**step), lr, beta1, beta2,
        math.sqrt(1 - beta2**step), eps, grad_scale, bool(shadows), kind, zero_grads, _aligned(rows), BLOCK, num_warps=8,
    )  # fmt: skip
