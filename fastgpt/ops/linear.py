"""Linear layers with what follows them fused into the product: activation(x W^T + bias) + residual. Formula in reference/.

The CPU engine multiplies with a packed product of its own (csrc/cpu/product.inl): fp32, or bf16 pairs summed in fp32 where the tensors
are bf16, autocast says so, or `torch.set_float32_matmul_precision("medium")` allows it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define
from fastgpt.ops.bias_activation import KINDS


def products_in_halves(dtype: torch.dtype) -> bool:
    """Whether numbers may be multiplied as bf16 where results are of this dtype, by torch's own setting."""
    return dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"


def is_transposed(weight: Tensor) -> bool:
    """Whether a matrix lies in memory as its transpose, contiguous: the engine reads it, and writes its gradient, as it is."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


def empty_gradient(weight: Tensor, transposed: bool) -> Tensor:
    """Memory for a weight's gradient, laid out as the weight where that is transposed."""
    return weight.new_empty(weight.shape[::-1]).t() if transposed else weight.new_empty(weight.shape)


def _code(dtype: torch.dtype) -> int:
    codes = {torch.float32: 0, torch.bfloat16: 1}
    if dtype not in codes:
        raise NotCovered(f"dtype {dtype}; covered are float32 and bfloat16")
    return codes[dtype]


def _slope_shape(shape: tuple[int, ...], activation: str, keeps: bool) -> tuple[int, ...]:
    return shape if activation and keeps else (0,)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    from fastgpt.ops import cpu

    if bias is not None and bias.dtype != weight.dtype:
        raise NotCovered(f"a bias of {bias.dtype} with a weight of {weight.dtype}")
    x_code, w_code, y_code = _code(x.dtype), _code(weight.dtype), _code(dtype)
    residual_code = y_code if residual is None else _code(residual.dtype)
    transposed = is_transposed(weight)
    x, weight = x.contiguous(), weight if transposed else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, width = weight.shape
    shape = (*x.shape[:-1], out)
    y = cpu.empty(shape, dtype)
    slope = cpu.empty(_slope_shape(shape, activation, keeps), dtype)
    cpu.kernels.linear(
        products_in_halves(dtype), transposed, x_code, w_code, y_code, residual_code, x.data_ptr(), weight.data_ptr(),
        cpu.address(bias), KINDS[activation] if activation else -1, slope.data_ptr() if slope.numel() else 0,
        cpu.address(residual), y.data_ptr(), y.numel() // max(out, 1), width, out, cpu.threads(),
    )  # fmt: skip
    return y, slope


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fastgpt.ops import cpu

    half = products_in_halves(grad.dtype)
    g_code, x_code, w_code = _code(grad.dtype), _code(x.dtype), _code(weight.dtype)
    transposed = is_transposed(weight)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight if transposed else weight.contiguous()
    out, width = weight.shape
    rows = x.numel() // max(width, 1)
    dx = cpu.empty(x.shape if needs_x else (0,), x.dtype)
    dweight = empty_gradient(weight, transposed) if needs_weight else weight.new_empty(0)
    dbias = torch.empty(out if needs_bias else 0, dtype=weight.dtype)
    if needs_x:
        cpu.kernels.linear_backward_input(
            half, transposed, g_code, w_code, x_code, 0, grad.data_ptr(), weight.data_ptr(), 0, dx.data_ptr(), rows, width, out,
            cpu.threads(),
        )  # fmt: skip
    if needs_weight or needs_bias:
        cpu.kernels.linear_backward_weight(
            half, transposed, False, g_code, x_code, w_code, w_code, grad.data_ptr(), x.data_ptr(),
            dweight.data_ptr() if needs_weight else 0, dbias.data_ptr() if needs_bias else 0, rows, width, out, cpu.threads(),
        )  # fmt: skip
    return dx, dweight, dbias


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape, dtype=dtype), x.new_empty(_slope_shape(shape, activation, keeps), dtype=dtype)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else 0),
        empty_gradient(weight, is_transposed(weight)) if needs_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        y, slope = below_autograd(_linear, x, weight, bias, residual, *options)
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, slope)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, residual))
        ctx.activation = options[0]
        return y, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        x, weight, slope = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        bias_dtype, residual_dtype = ctx.dtypes
        inner = grad * slope if ctx.activation else grad
        dx, dweight, dbias = _linear_backward(inner, x, weight, needs_x, needs_weight, needs_bias)
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias.to(bias_dtype) if needs_bias else None,
            grad.to(residual_dtype) if needs_residual else None,
            *(None,) * 3,
        )


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, ScalarType dtype, bool keeps)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.linear,
    cpu=_cpu,
    autograd=_Rule,
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference.linear_backward,
    cpu=_cpu_backward,
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(input @ weight^T + bias) + residual in one pass, summed in fp32 (fp64 for fp64).

    Args:
        input: (..., in), any floating dtype.
        weight: (out, in), also the `.t()` of a contiguous (in, out), which is read where it is. bias: (out). Of the
            input's dtype; under autocast, and with a bf16 input, float32 is taken too, and is rounded on its
            way into the product instead of being copied.
        activation: None, "relu", "sigmoid", "tanh", "gelu" (erf), "gelu_tanh" or "silu".
        residual: (..., out), added last.

    With torch.set_float32_matmul_precision("medium") the CPU engine multiplies float32 numbers as bfloat16 (relative error of a product
    about 2e-3) and sums in float32; with "highest", torch's default, and "high" in float32.

    Returns:
        (..., out) in the input's dtype, or the autocast dtype under autocast.

    Raises:
        TypeError: an integer input. ValueError: shapes that do not fit, an unknown activation.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu").shape
    torch.Size([2, 4])
    """
    if not input.is_floating_point():
        raise TypeError(f"linear: input has dtype {input.dtype}, expected a floating-point dtype")
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: input {tuple(input.shape)} and weight {tuple(weight.shape)}, expected (..., in) and (out, in)"
        )
    shape = (*input.shape[:-1], weight.shape[0])
    if bias is not None and tuple(bias.shape) != shape[-1:]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected {shape[-1:]}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"linear: residual has shape {tuple(residual.shape)}, expected {shape}")
    if activation is not None and activation not in KINDS:
        raise ValueError(f"linear: activation is {activation!r}, expected None or one of {', '.join(KINDS)}")
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    tensors = (input, weight, bias, residual)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y: Tensor = _linear(*tensors, activation or "", dtype, keeps)[0]
    return y
