"""Rows of a matrix by their numbers, and the gradient of the matrix, without atomics.

The backward sorts the ids, keeping the order of equal ones; the program of an id's first place sums all of its gradients in fp32 in
that order and writes, or adds to, its row once: the same bits at every run. An id outside the matrix gives a row of NaN and no
gradient, where the CPU raises: raising would make it wait for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embedding", "embedding_accumulate", "embedding_backward"]

BLOCK = 1024  # columns a program


@triton.jit
def embedding_fwd_kernel(ids_ptr, weight_ptr, y_ptr, rows, cols, BLOCK_N: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(ids_ptr + place).to(tl.int64)
    there = (row >= 0) & (row < rows)
    value = tl.load(weight_ptr + row * cols + col, mask=(col < cols) & there, other=float("nan"))
    tl.store(y_ptr + place * cols + col, value, mask=col < cols)


@triton.jit
def embedding_bwd_kernel(
    ids_ptr, places_ptr, grad_ptr, into_ptr, n, rows, cols, padding, KEEP: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """ids sorted, and where each stood; KEEP adds to what is there, else the sum is written."""
    first = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + first).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (row != before) & (row >= 0) & (row < rows) & (row != padding):
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_N], tl.float32)
        i = first
        current = row
        while current == row:
            place = tl.load(places_ptr + i)
            total += tl.load(grad_ptr + place * cols + col, mask=col < cols, other=0.0).to(tl.float32)
            i += 1
            current = tl.load(ids_ptr + i, mask=i < n, other=-1).to(tl.int64)
        into_ptr += row * cols
        if KEEP:
            total += tl.load(into_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        tl.store(into_ptr + col, total, mask=col < cols)


def _grid(count: int, cols: int) -> tuple[tuple[int, int], int]:
    block = min(triton.next_power_of_2(cols), BLOCK)
    return (count, triton.cdiv(cols, block)), block


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """ids of any shape, int32 or int64; weight (V, C). Returns (*ids.shape, C) in the weight's dtype."""
    ids, weight = input_ids.contiguous(), weight.contiguous()
    rows, cols = weight.shape
    y = weight.new_empty(*ids.shape, cols)
    if y.numel():
        grid, block = _grid(ids.numel(), cols)
        embedding_fwd_kernel[grid](ids, weight, y, rows, cols, block, num_warps=4)
    return y


def embedding_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int, keep: bool = True) -> None:
    """Add the gradients (*ids.shape, C) to the rows of a contiguous (V, C), or write them there unless `keep`; not to padding_idx."""
    rows, cols = into.shape
    ids, grad = input_ids.reshape(-1), grad.contiguous()
    if ids.numel() == 0 or into.numel() == 0:
        return
    ids, places = torch.sort(ids, stable=True)
    grid, block = _grid(ids.numel(), cols)
    embedding_bwd_kernel[grid](ids, places, grad, into, ids.numel(), rows, cols, padding_idx, keep, block, num_warps=4)


def embedding_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The gradient of a matrix of so many rows, in grad's dtype."""
    dweight = grad.new_zeros(rows, grad.shape[-1])
    embedding_accumulate(dweight, grad, input_ids, padding_idx, keep=False)
    return dweight
