"""Element-wise activations: relu, sigmoid, tanh, gelu (erf and tanh forms), silu.

Formulas in reference/. relu, sigmoid and tanh keep their result for the gradient, gelu and silu their input. Results are contiguous.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define
from fastgpt.ops.bias_activation import KINDS, bias_activation


def _kind(name: str, options: tuple[str, ...]) -> int:
    return KINDS["gelu_tanh" if options == ("tanh",) else name]


def _fake(x: Tensor, *options: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _define(name: str, keeps: str, option: str = "") -> Callable[..., Tensor]:
    """Register an activation and its gradient; `keeps` is "x" or "y", `option` a further schema argument."""

    def cpu_forward(x: Tensor, *options: str) -> Tensor:
        from fastgpt.ops import cpu

        code = cpu.dtype_code(x)
        x = x.contiguous()
        y = cpu.empty(x.shape, x.dtype)
        cpu.kernels.activation(_kind(name, options), code, x.data_ptr(), y.data_ptr(), x.numel(), cpu.threads())
        return y

    def cpu_backward(grad: Tensor, saved: Tensor, *options: str) -> Tensor:
        from fastgpt.ops import cpu

        code = cpu.dtype_code(grad)
        grad, saved = grad.contiguous(), saved.contiguous()
        dx = cpu.empty(grad.shape, grad.dtype)
        cpu.kernels.activation_backward(
            _kind(name, options), code, grad.data_ptr(), saved.data_ptr(), dx.data_ptr(), grad.numel(), cpu.threads()
        )
        return dx

    def fake_backward(grad: Tensor, saved: Tensor, *options: str) -> Tensor:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *options: str) -> Tensor:
            y: Tensor = below_autograd(forward, x, *options)
            ctx.save_for_backward(x if keeps == "x" else y)
            ctx.options = options
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return backward(grad, *ctx.saved_tensors, *ctx.options), *[None for _ in ctx.options]

    forward = define(
        f"{name}(Tensor x{option}) -> Tensor",
        fake=_fake,
        reference=lambda x, *options: getattr(reference, name)(x, *options).contiguous(),
        cpu=cpu_forward,
        autograd=Rule,
    )
    backward = define(
        f"{name}_backward(Tensor grad, Tensor {keeps}{option}) -> Tensor",
        fake=fake_backward,
        reference=lambda grad, saved, *options: getattr(reference, f"{name}_backward")(
            grad, saved, *options
        ).contiguous(),
        cpu=cpu_backward,
    )
    return forward


_relu = _define("relu", "y")
_sigmoid = _define("sigmoid", "y")
_tanh = _define("tanh", "y")
_silu = _define("silu", "x")
_gelu = _define("gelu", "x", ", str approximate")


def _check(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: input has dtype {x.dtype}, expected a floating-point dtype")


def relu(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """max(x, 0) of every element; any shape, any floating dtype; NaN stays NaN.

    Args:
        input: any shape, any floating dtype.
        bias: (C), C the input's last size, added first, with its gradient summed in the same backward pass; the input's dtype or,
            for a half-type input, float32. The sum is not rounded. All activations here take it.

    Raises:
        TypeError: an integer input or bias. ValueError: a bias of another shape.

    >>> relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    >>> relu(torch.tensor([-1.0, 2.0]), bias=torch.tensor([1.5, 0.0]))
    tensor([0.5000, 2.0000])
    """
    _check("relu", input)
    return _relu(input) if bias is None else bias_activation(input, bias, "relu")


def sigmoid(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """1 / (1 + exp(-x)) of every element, computed in fp32 (fp64 for fp64); any shape, any floating dtype; `bias` as in `relu`."""
    _check("sigmoid", input)
    return _sigmoid(input) if bias is None else bias_activation(input, bias, "sigmoid")


def tanh(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The hyperbolic tangent of every element, computed in fp32 (fp64 for fp64); any shape, any floating dtype; `bias` as in `relu`."""
    _check("tanh", input)
    return _tanh(input) if bias is None else bias_activation(input, bias, "tanh")


def silu(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x * sigmoid(x) of every element, computed in fp32 (fp64 for fp64); any shape, any floating dtype; `bias` as in `relu`."""
    _check("silu", input)
    return _silu(input) if bias is None else bias_activation(input, bias, "silu")


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """The Gaussian error linear unit of every element (arXiv 1606.08415), computed in fp32 (fp64 for fp64).

    Args:
        input: any shape, any floating dtype.
        approximate: "none" for x * Phi(x) by erf, "tanh" for GPT-2's x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
        bias: as in `relu`.

    Raises:
        TypeError: an integer input or bias. ValueError: another `approximate`, or a bias of another shape.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    _check("gelu", input)
    if bias is not None:
        return bias_activation(input, bias, "gelu_tanh" if approximate == "tanh" else "gelu")
    return _gelu(input, approximate)
