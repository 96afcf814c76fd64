"""Layer normalisation over the last dimensions (arXiv 1607.06450). Formula in reference.py."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define


def _codes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, int]:
    """The engine's dtype numbers of the input and of the parameters; one parameter dtype only."""
    from fastgpt.ops import cpu

    params = [p for p in (weight, bias) if p is not None]
    if len(params) == 2 and params[0].dtype != params[1].dtype:
        raise NotCovered(f"weight {params[0].dtype} with bias {params[1].dtype}")
    return cpu.dtype_code(x), cpu.dtype_code(params[0] if params else x)


def _cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from fastgpt.ops import cpu

    code, param_code = _codes(x, weight, bias)
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    cpu.kernels.layer_norm(
        code, param_code, x.data_ptr(), cpu.address(weight), cpu.address(bias), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
        mean.numel(), x.shape[-1], eps, cpu.threads(),
    )  # fmt: skip
    return y, mean, rstd


def _cpu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fastgpt.ops import cpu

    code, param_code = _codes(x, weight, None)
    if grad.dtype != x.dtype:
        raise NotCovered(f"a gradient of {grad.dtype} for an input of {x.dtype}")
    grad, x = grad.contiguous(), x.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty_like(x)
    size = x.shape[-1] if needs_params else 0
    dweight = torch.empty(size, dtype=x.dtype if weight is None else weight.dtype)
    dbias = torch.empty_like(dweight)
    cpu.kernels.layer_norm_backward(
        code, param_code, grad.data_ptr(), x.data_ptr(), cpu.address(weight), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(),
        dweight.data_ptr() if needs_params else 0, dbias.data_ptr() if needs_params else 0, mean.numel(), x.shape[-1],
        cpu.threads(),
    )  # fmt: skip
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
    shape = tuple(normalized_shape)
    if not input.is_floating_point():
        raise TypeError(f"layer_norm: input has dtype {input.dtype}, expected a floating-point dtype")
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"layer_norm: normalized_shape is {shape}, expected the last sizes of the input {tuple(input.shape)}"
        )
    for name, param in (("weight", weight), ("bias", bias)):
        if param is not None and tuple(param.shape) != shape:
            raise ValueError(f"layer_norm: {name} has shape {tuple(param.shape)}, expected {shape}")
    if len(shape) == 1:
        y: Tensor = _layer_norm(input, weight, bias, eps)[0]
        return y
    size = math.prod(shape)
    flat = [None if p is None else p.reshape(size) for p in (weight, bias)]
    y = _layer_norm(input.reshape(*input.shape[: -len(shape)], size), flat[0], flat[1], eps)[0]
    return y.reshape(input.shape)
