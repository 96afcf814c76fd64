"""Layer normalisation over the last dimensions (arXiv 1607.06450). Formula in reference/."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define


def run_cpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The C++ kernel of all norms: y, what was normalised (x or x + residual), mean (empty for RMSNorm) and rstd."""
    from fastgpt.ops import cpu

    params = [p for p in (weight, bias) if p is not None]
    if len(params) == 2 and params[0].dtype != params[1].dtype:
        raise NotCovered(f"weight {params[0].dtype} with bias {params[1].dtype}")
    if residual is not None and residual.dtype != x.dtype and x.dtype == torch.float32:
        x, residual = residual, x  # the kernel takes a bf16 x with an fp32 residual
    x_code, code = cpu.dtype_code(x), cpu.dtype_code(x if residual is None else residual)
    param_code = cpu.dtype_code(params[0] if params else x)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = cpu.empty(x.shape, x.dtype if residual is None else residual.dtype)
    summed = x if residual is None else cpu.empty(y.shape, y.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    cpu.kernels.layer_norm(
        code, x_code, param_code, x.data_ptr(), cpu.address(residual), cpu.address(weight), cpu.address(bias),
        0 if residual is None else summed.data_ptr(), y.data_ptr(), 0 if rms else mean.data_ptr(), rstd.data_ptr(),
        rstd.numel(), x.shape[-1], eps, cpu.threads(),
    )  # fmt: skip
    return y, summed, mean, rstd


def run_cpu_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs_params: bool,
    needs_half: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The C++ kernel of all norms' gradients: dx, dx in bf16 (empty unless asked for), dweight and dbias; no mean: RMSNorm."""
    from fastgpt.ops import cpu

    code = cpu.dtype_code(x)
    param_code = code if weight is None else cpu.dtype_code(weight)
    for name, g in (("gradient", grad), ("gradient of the sum", grad_sum)):
        if g is not None and g.dtype != x.dtype:
            raise NotCovered(f"a {name} of {g.dtype} for an input of {x.dtype}")
    grad, x = grad.contiguous(), x.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = cpu.empty(x.shape, x.dtype)
    dx_half = torch.empty(x.shape if needs_half else 0, dtype=torch.bfloat16)
    dweight = torch.empty(x.shape[-1] if needs_params else 0, dtype=x.dtype if weight is None else weight.dtype)
    dbias = torch.empty_like(dweight)
    cpu.kernels.layer_norm_backward(
        code, param_code, grad.data_ptr(), cpu.address(grad_sum), x.data_ptr(), cpu.address(weight), cpu.address(mean),
        rstd.data_ptr(), dx.data_ptr(), dx_half.data_ptr() if needs_half else 0,
        dweight.data_ptr() if needs_params else 0, dbias.data_ptr() if needs_params and mean is not None else 0,
        rstd.numel(), x.shape[-1], cpu.threads(),
    )  # fmt: skip
    return dx, dx_half, dweight, dbias


def _cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = run_cpu(x, None, weight, bias, eps)
    return y, mean, rstd


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, dweight, dbias = run_cpu_backward(grad, None, x, weight, mean, rstd, needs_params)
    return dx, dweight, dbias


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[:-1], dtype=statistics)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = x.new_empty(x.shape[-1] if needs_params else 0, dtype=x.dtype if weight is None else weight.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dweight, torch.empty_like(dweight)


def _reference(*args: Any) -> tuple[Tensor, ...]:
    return tuple(result.contiguous() for result in reference.layer_norm(*args))


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(result.contiguous() for result in reference.layer_norm_backward(*args))


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = below_autograd(_layer_norm, x, weight, bias, eps)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _eps = ctx.needs_input_grad
        needs_params = needs_weight or needs_bias
        dx, dweight, dbias = _layer_norm_backward(grad, x, weight, mean, rstd, needs_params)
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias.to(ctx.bias_dtype) if needs_bias else None,
            None,
        )


_layer_norm = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=_reference,
    cpu=_cpu,
    autograd=_Rule,
)
_layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool needs_params)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=_reference_backward,
    cpu=_cpu_backward,
)


def check_norm(
    op: str, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[int, ...]:
    """The normalised shape as a tuple; raises what the norms' docstrings say."""
    shape = tuple(normalized_shape)
    if not input.is_floating_point():
        raise TypeError(f"{op}: input has dtype {input.dtype}, expected a floating-point dtype")
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{op}: normalized_shape is {shape}, expected the last sizes of the input {tuple(input.shape)}"
        )
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None and tuple(param.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(param.shape)}, expected {shape}")
    return shape


def flatten_norm(shape: tuple[int, ...], input: Tensor, *rest: Tensor | None) -> list[Tensor | None]:
    """The input and whatever has its shape as (..., prod(shape)), parameters as (prod(shape))."""
    size = math.prod(shape)
    return [None if t is None else t.reshape(*t.shape[: t.dim() - len(shape)], size) for t in (input, *rest)]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions, computed in fp32 (fp64 for fp64).

    Args:
        input: (..., *normalized_shape), any floating dtype.
        normalized_shape: the sizes of the last dimensions, which are normalised together.
        weight, bias: of shape `normalized_shape`, the input's dtype or, for a half-type input, float32.
        eps: added to the variance.

    Returns:
        The input's shape and dtype, contiguous.

    Raises:
        TypeError: an integer input. ValueError: `normalized_shape` or a parameter's shape does not fit.
    """
    shape = check_norm("layer_norm", input, normalized_shape, weight, bias)
    if len(shape) == 1:
        y: Tensor = _layer_norm(input, weight, bias, eps)[0]
        return y
    return _layer_norm(*flatten_norm(shape, input, weight, bias), eps)[0].reshape(input.shape)
