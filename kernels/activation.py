"""Element-wise activations and their gradients: relu, sigmoid, tanh, silu, gelu by erf (arXiv 1606.08415) and GPT-2's gelu by tanh.

Formulas in fastgpt/ops/reference; here some are written in an equal form that keeps its precision in fp32:

    gelu by tanh: x / 2 * (1 + tanh u) = x / (1 + exp(-2 u)),   u = sqrt(2 / pi) * (x + 0.044715 x^3)
    s (1 - s) for a sigmoid s of z = e / (1 + e)^2,             e = exp(-|z|)
    tanh near 0: x * P(x^2), as 1 - 2 / (1 + exp(2 x)) would cancel

A kernel is specialised on KIND, a string. All read and write each value once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning

__all__ = ["KEEPS_RESULT", "activation", "activation_backward"]

KINDS = ("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh")
KEEPS_RESULT = (
    "relu",
    "sigmoid",
    "tanh",
)  # their gradient is computed from the result, that of the others from the input
CHOICES = tuning.candidates(BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8))

SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    """tanh to 2e-7 of its value; the polynomial is fitted to tanh(x) / x at the Chebyshev nodes of 0 <= x^2 <= 0.36."""
    z = x * x
    p = -0.0058564278590460634 * z + 0.02075747544048156
    p = p * z - 0.05376992178332854
    p = p * z + 0.13331704702148678
    p = p * z - 0.3333328397177173
    p = p * z + 0.9999999975630957
    t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.6, x * p, tl.where(x < 0.0, -t, t))


@triton.jit
def _sigmoid_slope(z):
    """s (1 - s) for s = sigmoid(z)."""
    e = tl.exp(-tl.abs(z))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """f(x) in fp32."""
    if KIND == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    elif KIND == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    elif KIND == "tanh":
        y = _tanh(x)
    elif KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x)
        y = x / (1.0 + tl.exp(-2.0 * u))
    return y


@triton.jit
def activate_backward(grad, v, KIND: tl.constexpr):
    """grad * f'(x) in fp32; v is f(x) for KEEPS_RESULT and x otherwise."""
    if KIND == "relu":
        dx = tl.where(v <= 0.0, 0.0, grad)
    elif KIND == "sigmoid":
        dx = grad * v * (1.0 - v)
    elif KIND == "tanh":
        dx = grad * (1.0 - v * v)
    elif KIND == "silu":
        dx = grad * (1.0 / (1.0 + tl.exp(-v)) + v * _sigmoid_slope(v))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        dx = grad * (0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density)
    else:
        u = SQRT_2_OVER_PI * (v + CUBIC * v * v * v)
        slope = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * v * v)
        dx = grad * (1.0 / (1.0 + tl.exp(-2.0 * u)) + 2.0 * v * _sigmoid_slope(2.0 * u) * slope)
    return dx


@triton.jit
def activation_fwd_kernel(x_ptr, y_ptr, n_elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """y = f(x), BLOCK elements a program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n_elements).to(tl.float32)
    tl.store(y_ptr + offsets, activate(x, KIND), mask=offsets < n_elements)


@triton.jit
def activation_bwd_kernel(grad_ptr, saved_ptr, dx_ptr, n_elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """dx = dy * f'(x), BLOCK elements a program; `saved` is y for KEEPS_RESULT and x otherwise."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + offsets, mask=offsets < n_elements).to(tl.float32)
    v = tl.load(saved_ptr + offsets, mask=offsets < n_elements).to(tl.float32)
    tl.store(dx_ptr + offsets, activate_backward(grad, v, KIND), mask=offsets < n_elements)


def _launch(kernel: Any, *tensors: Tensor, kind: str) -> None:
    """Start a kernel over tensors of one size."""
    x, n = tensors[0], tensors[0].numel()
    block = tuning.sizes(x).elements
    tile = {"BLOCK": block, "num_warps": tuning.warps(x, block)}
    tuning.launch(
        kernel,
        lambda tile: (triton.cdiv(n, tile["BLOCK"]),),
        (*tensors, n),
        tile,
        CHOICES,
        ("n_elements", "KIND"),
        KIND=kind,
    )


def activation(kind: str, x: Tensor) -> Tensor:
    """The forward of one of KINDS; x of any shape and strides. Returns x's shape and dtype, contiguous."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _launch(activation_fwd_kernel, x, y, kind=kind)
    return y


def activation_backward(kind: str, grad: Tensor, saved: Tensor) -> Tensor:
    """The gradient of x from that of y, and from y for KEEPS_RESULT or x otherwise. Returns grad's shape and dtype, contiguous."""
    grad, saved = grad.contiguous(), saved.contiguous()
    dx = torch.empty_like(grad)
    if grad.numel():
        _launch(activation_bwd_kernel, grad, saved, dx, kind=kind)
    return dx
