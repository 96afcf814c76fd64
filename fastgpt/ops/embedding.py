"""Embedding: rows of a matrix by their numbers, and a backward that touches only the rows that occur. Formula in reference/.

No max_norm, no scaling by frequency, no sparse gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define

_LARGEST = 2**31 - 1


def _cpu(input_ids: Tensor, weight: Tensor, padding_idx: int, accumulate_grad: bool) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(weight)
    ids, weight = input_ids.contiguous(), weight.contiguous()
    rows, cols = weight.shape
    y = cpu.empty((*ids.shape, cols), weight.dtype)
    cpu.kernels.embedding(
        code,
        ids.dtype == torch.int64,
        ids.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        ids.numel(),
        rows,
        cols,
        cpu.threads(),
    )
    return y


def _cpu_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int, keep: bool) -> None:
    """Adds the gradient's rows into a contiguous matrix, or writes all of it unless `keep`."""
    from fastgpt.ops import cpu

    grad_code, code = cpu.dtype_code(grad), cpu.dtype_code(into)
    rows, cols = into.shape
    if max(rows, input_ids.numel()) > _LARGEST:
        raise NotCovered("more than 2^31 - 1 ids or rows")
    if not into.is_contiguous():
        raise NotCovered("a gradient that is not contiguous")
    ids, grad = input_ids.contiguous(), grad.contiguous()
    cpu.kernels.embedding_backward(
        grad_code,
        code,
        ids.dtype == torch.int64,
        keep,
        ids.data_ptr(),
        grad.data_ptr(),
        into.data_ptr(),
        ids.numel(),
        rows,
        cols,
        padding_idx,
        cpu.threads(),
    )


def _cpu_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    from fastgpt.ops import cpu

    dweight = cpu.empty((rows, grad.shape[-1]), grad.dtype)
    _cpu_accumulate(dweight, grad, input_ids, padding_idx, False)
    return dweight


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, padding_idx: int, accumulate_grad: bool) -> Tensor:
        y: Tensor = below_autograd(_embedding, input_ids, weight, padding_idx, accumulate_grad)
        ctx.save_for_backward(input_ids)
        ctx.padding_idx, ctx.rows = padding_idx, weight.shape[0]
        ctx.leaf = weight if accumulate_grad and weight.is_leaf else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (input_ids,) = ctx.saved_tensors
        into = None if ctx.leaf is None else ctx.leaf.grad
        if into is not None and into.layout == torch.strided:
            _embedding_accumulate(into, grad, input_ids, ctx.padding_idx)
            torch.autograd.graph.increment_version(into)
            return None, None, None, None
        return None, _embedding_backward(grad, input_ids, ctx.rows, ctx.padding_idx), None, None


_embedding = define(
    "embedding(Tensor input_ids, Tensor weight, int padding_idx, bool accumulate_grad) -> Tensor",
    fake=lambda input_ids, weight, *_: weight.new_empty(*input_ids.shape, weight.shape[1]),
    reference=lambda input_ids, weight, *_: reference.embedding(input_ids, weight),
    cpu=_cpu,
    autograd=_Rule,
)
_embedding_backward = define(
    "embedding_backward(Tensor grad, Tensor input_ids, SymInt rows, int padding_idx) -> Tensor",
    fake=lambda grad, input_ids, rows, padding_idx: grad.new_empty(rows, grad.shape[-1]),
    reference=reference.embedding_backward,
    cpu=_cpu_backward,
)
_embedding_accumulate = define(
    "embedding_accumulate_backward(Tensor(a!) into, Tensor grad, Tensor input_ids, int padding_idx) -> ()",
    fake=lambda into, grad, input_ids, padding_idx: None,
    reference=reference.embedding_accumulate,
    cpu=lambda into, grad, input_ids, padding_idx: _cpu_accumulate(into, grad, input_ids, padding_idx, True),
)


def embedding(
    input_ids: Tensor, weight: Tensor, padding_idx: int | None = None, *, accumulate_grad: bool = False
) -> Tensor:
    """weight[input_ids]: the row of every id.

    Args:
        input_ids: any shape, int64 or int32, each in [0, V).
        weight: (V, C), any floating dtype.
        padding_idx: a row that gets no gradient; a negative one counts from the end.
        accumulate_grad: where `weight` is a leaf that has a gradient already, the backward adds its rows into `weight.grad` itself and
            passes None on. Only the rows that occur are read and written, which for a large vocabulary is many times faster than a
            whole matrix of zeros. For training loops that call `backward`; hooks on `weight` do not see this part of the gradient, and
            torch.autograd.grad(..., weight) does not return it. Without effect under torch.compile.

    Returns:
        (*input_ids.shape, C) in the weight's dtype, contiguous. The gradient of a row that occurs more than once is summed in fp32 in
        the order of the ids: the same bits for any number of threads.

    Raises:
        TypeError: ids or a weight of another dtype. ValueError: a weight that is no matrix, a padding_idx outside.
        IndexError: an id outside [0, V), on the CPU.

    >>> embedding(torch.tensor([2, 0]), torch.tensor([[1.0], [2.0], [3.0]]))
    tensor([[3.],
            [1.]])
    """
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: input_ids has dtype {input_ids.dtype}, expected torch.int64 or torch.int32")
    if not weight.is_floating_point():
        raise TypeError(f"embedding: weight has dtype {weight.dtype}, expected a floating-point dtype")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}, expected (V, C)")
    rows = weight.shape[0]
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise ValueError(f"embedding: padding_idx is {padding_idx}, expected {-rows} to {rows - 1}")
        padding_idx %= rows
    if accumulate_grad and torch.compiler.is_compiling():
        accumulate_grad = False
    y: Tensor = _embedding(input_ids, weight, -1 if padding_idx is None else padding_idx, accumulate_grad)
    return y
