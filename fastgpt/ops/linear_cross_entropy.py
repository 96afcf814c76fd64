"""A model's last projection and its loss in one op: cross_entropy(x W^T, target) without the whole matrix of logits.

Rows go in chunks: a chunk's logits are made, turned into its losses and, where a gradient will be asked for, in place into
their own gradient, which at once becomes the chunk's part of the gradients of x and W. So the gradients are made in the forward
and only scaled in the backward, and the largest matrix is a chunk's (as in Liger Kernel, arXiv:2410.10989, section 3.2). The
chunks are of a fixed size, so results do not depend on the number of threads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define
from fastgpt.ops.linear import products_in_halves

_REDUCTIONS = ("mean", "sum")
CHUNK_BYTES = 64 << 20  # of logits at a time: 333 rows of 50,304 fp32 numbers
DEVICE_CHUNK = 1 << 29  # numbers of logits at a time on a GPU: 10,672 rows of 50,304, 1 GiB in bf16
_DEVICE_LEAST_ROWS, _DEVICE_MOST_ROWS = 1024, 16384
_LEAST_ROWS = 256  # the weights are packed anew for each chunk, which is worth it from here on


def _chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    """Rows a chunk, as even as they can be."""
    most = max(_LEAST_ROWS, CHUNK_BYTES // max(1, classes * itemsize))
    chunks = max(1, -(-rows // most))
    return -(-rows // chunks)


def device_chunk_rows(rows: int, classes: int) -> int:
    """Rows a chunk on a GPU: 8k to 16k of GPT-2's vocabulary, since each chunk reads the weights three times; as even as they can be,
    multiples of 8, so that every chunk begins at 16 bytes."""
    most = min(max(_DEVICE_LEAST_ROWS, DEVICE_CHUNK // max(1, classes)), _DEVICE_MOST_ROWS)
    chunks = max(1, -(-rows // most))
    return max(8, -(-rows // (8 * chunks)) * 8)


def _cpu(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastgpt.ops import cpu
    from fastgpt.ops.linear import _code

    codes = x_code, w_code, logits_code = _code(x.dtype), _code(weight.dtype), _code(dtype)
    x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
    (rows, width), classes = x.shape, weight.shape[0]
    counted = cpu.kernels.count_targets(target.data_ptr(), rows, classes, ignore_index)
    scale = 1.0 if reduction == "sum" else 1.0 / counted if counted else 0.0
    losses, lse = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float64)
    dx = cpu.empty(x.shape if keeps else (0,), x.dtype)
    dweight = cpu.empty(weight.shape if keeps else (0,), torch.float32)
    if rows == 0:
        dweight.zero_()
    half = products_in_halves(dtype)
    threads = cpu.threads()
    chunk = _chunk_rows(rows, classes, dtype.itemsize)
    logits = cpu.empty((chunk, classes), dtype)
    for first in range(0, rows, max(chunk, 1)):
        count = min(chunk, rows - first)
        x_part = x.data_ptr() + first * width * x.element_size()
        row = 4 * first
        cpu.kernels.linear(
            half,
            False,
            *codes,
            0,
            x_part,
            weight.data_ptr(),
            0,
            -1,
            0,
            0,
            logits.data_ptr(),
            count,
            width,
            classes,
            threads,
        )
        cpu.kernels.cross_entropy(
            logits_code, logits.data_ptr(), target.data_ptr() + 2 * row, 0, losses.data_ptr() + row, lse.data_ptr() + 2 * row,
            logits.data_ptr() if keeps else 0, scale, count, classes, ignore_index, label_smoothing, 0.0, threads,
        )  # fmt: skip
        if not keeps:
            continue
        cpu.kernels.linear_backward_input(
            half, False, logits_code, w_code, x_code, 0, logits.data_ptr(), weight.data_ptr(), 0,
            dx.data_ptr() + first * width * x.element_size(), count, width, classes, threads,
        )  # fmt: skip
        cpu.kernels.linear_backward_weight(
            half, False, first > 0, logits_code, x_code, 0, 0, logits.data_ptr(), x_part, dweight.data_ptr(), 0, count, width, classes,
            threads,
        )  # fmt: skip
    total = losses.sum(dtype=torch.float64)
    loss = (total if reduction == "sum" else total / counted).float()
    return loss, dx, dweight.to(weight.dtype)


def _fake(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if keeps else 0),
        weight.new_empty(weight.shape if keeps else 0),
    )


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, dx, dweight = below_autograd(_linear_cross_entropy, x, weight, target, *options)
        ctx.mark_non_differentiable(dx, dweight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dx, dweight)
        return loss, dx, dweight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        dx, dweight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return _scaled(dx, grad) if needs_x else None, _scaled(dweight, grad) if needs_weight else None, *(None,) * 6


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """The gradient times the loss's own, which is 1 in `loss.backward()`; then nothing is copied."""
    if type(grad) is Tensor and grad.device.type == "cpu" and grad.item() == 1.0:  # not while it is traced
        return gradient
    return gradient * grad.to(gradient.dtype)


_linear_cross_entropy = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, int ignore_index, str reduction, float label_smoothing,"
    " ScalarType dtype, bool keeps) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.linear_cross_entropy,
    cpu=_cpu,
    autograd=_Rule,
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(input @ weight^T, target), the logits never whole in memory; gradients are made in the forward.

    Args:
        input: (N, C), any floating dtype.
        weight: (V, C), the projection to the vocabulary.
        target: (N), int64 class numbers in [0, V), or `ignore_index`.
        ignore_index, label_smoothing: as for `cross_entropy`.
        reduction: "mean" over the targets that count, or "sum".

    Logits are of the input's dtype (the autocast dtype under autocast); products follow `linear`.

    Returns:
        A scalar; float32 for half types. It can be differentiated once, with respect to input and weight.

    Raises:
        TypeError: an integer input, targets that are not int64. ValueError: shapes or options that do not fit.
        IndexError: a target outside [0, V), on the CPU.

    >>> linear_cross_entropy(torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([0, 1, 4]))
    tensor(1.6094)
    """
    name = "linear_cross_entropy"
    if not input.is_floating_point():
        raise TypeError(f"{name}: input has dtype {input.dtype}, expected a floating-point dtype")
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target has dtype {target.dtype}, expected torch.int64")
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1] or target.shape != input.shape[:1]:
        got = f"{tuple(input.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        raise ValueError(f"{name}: input, weight and target have shapes {got}, expected (N, C), (V, C) and (N)")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}, expected one of {_REDUCTIONS}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, expected 0 to 1")
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    keeps = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    loss: Tensor = _linear_cross_entropy(input, weight, target, ignore_index, reduction, label_smoothing, dtype, keeps)[
        0
    ]
    return loss
