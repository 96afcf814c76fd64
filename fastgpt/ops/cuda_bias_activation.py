"""The engine `cuda`: an activation of x + bias, and both gradients, by csrc/cuda/bias_activation.cuh."""

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.backend import implement
from fastgpt.ops.bias_activation import KINDS
from fastgpt.ops.cuda_norm import PARTS, _param_code


def _prepared(x: Tensor, bias: Tensor, *others: Tensor) -> tuple[int, int, int, int, int]:
    """Type codes, rows, columns, and over how many blocks the rows are spread."""
    cuda._check(x, bias, *others)
    code = cuda._same_type(x, *others)
    cols = bias.numel()
    rows = x.numel() // cols if cols else 0
    return code, _param_code(code, bias), rows, cols, max(1, min(rows, PARTS))


@implement("bias_activation", "cuda")
def _bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    code, bias_code, rows, cols, parts = _prepared(x, bias)
    x, bias = x.contiguous(), bias.contiguous()
    y = x.new_empty(x.shape)
    cuda._launch("bias_activation", x.device, KINDS[kind], code, bias_code, x, bias, y, parts, rows, cols)
    return y


@implement("bias_activation_backward", "cuda")
def _bias_activation_backward(
    grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    code, bias_code, rows, cols, count = _prepared(saved, bias, grad)
    grad, saved, bias = grad.contiguous(), saved.contiguous(), bias.contiguous()
    dx = grad.new_empty(grad.shape)
    dbias = bias.new_empty(bias.shape if needs_bias else 0)
    if grad.numel() == 0:
        return dx, dbias.zero_()
    parts = bias.new_empty((count, cols), dtype=torch.float32) if needs_bias else None
    cuda._launch(
        "bias_activation_backward", grad.device, KINDS[kind], code, bias_code, grad, saved, bias, dx,
        dbias if needs_bias else None, parts, count, rows, cols,
    )  # fmt: skip
    return dx, dbias
