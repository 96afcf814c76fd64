"""An activation of x + bias in one pass: what `ops.gelu(x, bias=b)` and its kin call. Formula in reference/.

The sum x + bias is not rounded before the activation, and the bias's gradient is summed while the input's is written.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define
from fastgpt.ops.reference import KEEPS_RESULT

KINDS = {"relu": 0, "sigmoid": 1, "tanh": 2, "gelu": 3, "gelu_tanh": 4, "silu": 5}  # the C++ enum Activation


def _cpu(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    from fastgpt.ops import cpu

    code, bias_code = cpu.dtype_code(x), cpu.dtype_code(bias)
    x, bias = x.contiguous(), bias.contiguous()
    y = cpu.empty(x.shape, x.dtype)
    cols = bias.numel()
    rows = x.numel() // cols if cols else 0
    cpu.kernels.bias_activation(
        KINDS[kind], code, bias_code, x.data_ptr(), bias.data_ptr(), y.data_ptr(), rows, cols, cpu.threads()
    )
    return y


def _cpu_backward(grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool) -> tuple[Tensor, Tensor]:
    from fastgpt.ops import cpu

    code, bias_code = cpu.dtype_code(saved), cpu.dtype_code(bias)
    if grad.dtype != saved.dtype:
        raise NotCovered(f"a gradient of {grad.dtype} for an input of {saved.dtype}")
    grad, saved, bias = grad.contiguous(), saved.contiguous(), bias.contiguous()
    dx = cpu.empty(grad.shape, grad.dtype)
    dbias = bias.new_empty(bias.shape if needs_bias else 0)
    cols = bias.numel()
    rows = grad.numel() // cols if cols else 0
    cpu.kernels.bias_activation_backward(
        KINDS[kind], code, bias_code, grad.data_ptr(), saved.data_ptr(), bias.data_ptr(), dx.data_ptr(),
        dbias.data_ptr() if needs_bias else 0, rows, cols, cpu.threads(),
    )  # fmt: skip
    return dx, dbias


def _fake(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(saved, memory_format=torch.contiguous_format)
    return dx, bias.new_empty(bias.shape if needs_bias else 0)


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, kind: str) -> Tensor:
        y: Tensor = below_autograd(_bias_activation, x, bias, kind)
        ctx.save_for_backward(y if kind in KEEPS_RESULT else x, bias)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        dx, dbias = _bias_activation_backward(grad, *ctx.saved_tensors, ctx.kind, needs_bias)
        return dx if needs_x else None, dbias if needs_bias else None, None


_bias_activation = define(
    "bias_activation(Tensor x, Tensor bias, str kind) -> Tensor",
    fake=_fake,
    reference=lambda *args: reference.bias_activation(*args).contiguous(),
    cpu=_cpu,
    autograd=_Rule,
)
_bias_activation_backward = define(
    "bias_activation_backward(Tensor grad, Tensor saved, Tensor bias, str kind, bool needs_bias) -> (Tensor, Tensor)",
    fake=_fake_backward,
    reference=lambda *args: tuple(result.contiguous() for result in reference.bias_activation_backward(*args)),
    cpu=_cpu_backward,
)


def bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    """f(x + bias), f by a name in KINDS; the public functions of activation.py check the input.

    Raises:
        ValueError: a bias that is not of x's last size. TypeError: an integer bias.
    """
    if not bias.is_floating_point():
        raise TypeError(f"{kind}: bias has dtype {bias.dtype}, expected a floating-point dtype")
    if x.dim() == 0 or tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(
            f"{kind}: bias has shape {tuple(bias.shape)}, expected the input's last size {tuple(x.shape[-1:])}"
        )
    return _bias_activation(x, bias, kind)
