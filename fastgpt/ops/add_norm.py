"""A residual and the norm after it in one pass: summed = input + residual, normed = norm(summed).

Formulas in reference/, kernel in csrc/cpu/layer_norm.inl. The sum is rounded to its dtype first, so the results are those of the
two steps alone. The backward pass takes the gradients of both results and gives both addends theirs, which is the same one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define
from fastgpt.ops.layer_norm import check_norm, flatten_norm, run_cpu, run_cpu_backward
from fastgpt.ops.rms_norm import default_eps

_HALF = torch.bfloat16


def _cpu_layer(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    return run_cpu(x, residual, weight, bias, eps)


def _cpu_rms(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    y, summed, _, rstd = run_cpu(x, residual, weight, None, eps, rms=True)
    return y, summed, rstd


def _cpu_rms_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_half: bool,
) -> tuple[Tensor, ...]:
    return run_cpu_backward(grad, grad_sum, summed, weight, None, rstd, needs_weight, needs_half)[:3]


def _fake(statistics: int) -> Any:
    """The shapes of normed, summed and so many statistics."""

    def fake(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        statistic = torch.float64 if dtype == torch.float64 else torch.float32
        return y, torch.empty_like(y), *(x.new_empty(x.shape[:-1], dtype=statistic) for _ in range(statistics))

    return fake


def _fake_backward(params: int) -> Any:
    """The shapes of dx, dx in bf16 and so many parameters' gradients."""

    def fake(
        grad: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        needs_params, needs_half = rest[-2:]
        dtype = summed.dtype if weight is None else weight.dtype
        size = summed.shape[-1] if needs_params else 0
        return (
            torch.empty_like(summed, memory_format=torch.contiguous_format),
            summed.new_empty(summed.shape if needs_half else 0, dtype=_HALF),
            *(summed.new_empty(size, dtype=dtype) for _ in range(params)),
        )

    return fake


def _contiguous(formula: Any) -> Any:
    return lambda *args: tuple(result.contiguous() for result in formula(*args))


class _Rule(torch.autograd.Function):
    """Of both ops; the arguments are x, residual, weight, bias for LayerNorm only, eps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        layer = len(rest) == 2
        forward = _add_layer_norm if layer else _add_rms_norm
        ctx.gradient = _add_layer_norm_backward if layer else _add_rms_norm_backward
        y, summed, *statistics = below_autograd(forward, x, residual, weight, *rest)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, *statistics)
        ctx.dtypes = x.dtype, residual.dtype
        ctx.bias_dtype = rest[0].dtype if layer and rest[0] is not None else None
        return y, summed, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        *needs, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        has_bias = len(ctx.needs_input_grad) == 5
        needs_bias = has_bias and needs_bias
        wanted = [dtype if need else None for need, dtype in zip(needs, ctx.dtypes, strict=True)]  # of each addend
        nothing = [None] * (2 if has_bias else 1)  # for the bias and eps
        if grad is None:  # only the sum was used
            dx = [None if dtype is None or grad_sum is None else grad_sum.to(dtype) for dtype in wanted]
            return *dx, None, *nothing
        summed, weight, *statistics = ctx.saved_tensors
        # An addend in bf16 beside one in fp32 (autocast) gets its gradient from the same pass.
        needs_half = summed.dtype == torch.float32 and _HALF in wanted
        wide, half, dweight, *dbias = ctx.gradient(
            grad, grad_sum, summed, weight, *statistics, needs_weight or needs_bias, needs_half
        )
        dx = [None if dtype is None else half if needs_half and dtype == _HALF else wide.to(dtype) for dtype in wanted]
        if needs_bias:
            nothing[0] = dbias[0].to(ctx.bias_dtype)
        return *dx, dweight if needs_weight else None, *nothing


_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake(2),
    reference=_contiguous(reference.add_layer_norm),
    cpu=_cpu_layer,
    autograd=_Rule,
)
_add_layer_norm_backward = define(
    "add_layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor summed, Tensor? weight, Tensor mean, Tensor rstd,"
    " bool needs_params, bool needs_half) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward(2),
    reference=_contiguous(reference.add_layer_norm_backward),
    cpu=run_cpu_backward,
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake(1),
    reference=_contiguous(reference.add_rms_norm),
    cpu=_cpu_rms,
    autograd=_Rule,
)
_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor summed, Tensor? weight, Tensor rstd,"
    " bool needs_weight, bool needs_half) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward(1),
    reference=_contiguous(reference.add_rms_norm_backward),
    cpu=_cpu_rms_backward,
)


def _check(
    op: str,
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[int, ...]:
    shape = check_norm(op, input, normalized_shape, weight, bias)
    if residual.shape != input.shape:
        raise ValueError(f"{op}: residual has shape {tuple(residual.shape)}, expected the input's {tuple(input.shape)}")
    if not residual.is_floating_point():
        raise TypeError(f"{op}: residual has dtype {residual.dtype}, expected a floating-point dtype")
    return shape


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """summed = input + residual and normed = layer_norm(summed) in one pass, computed in fp32 (fp64 for fp64).

    Args:
        input, residual: (..., *normalized_shape), any floating dtypes. fp32 with bf16, as autocast leaves them, costs no cast.
        normalized_shape, weight, bias, eps: as for `layer_norm`, of the sum.

    Returns:
        (normed, summed), both of the input's shape and the promoted dtype, contiguous. Both may be used under autograd.

    Raises:
        TypeError: an integer input or residual. ValueError: a shape does not fit.

    >>> normed, x = add_layer_norm(torch.ones(1, 2), torch.tensor([[0.0, 2.0]]), (2,), eps=0.0)
    >>> normed, x
    (tensor([[-1.,  1.]]), tensor([[1., 3.]]))
    """
    shape = _check("add_layer_norm", input, residual, normalized_shape, weight, bias)
    if len(shape) == 1:
        normed, summed, _, _ = _add_layer_norm(input, residual, weight, bias, eps)
        return normed, summed
    normed, summed, _, _ = _add_layer_norm(*flatten_norm(shape, input, residual, weight, bias), eps)
    return normed.reshape(input.shape), summed.reshape(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """summed = input + residual and normed = rms_norm(summed) in one pass; else as `add_layer_norm`.

    Args:
        input, residual: (..., *normalized_shape), any floating dtypes.
        normalized_shape, weight, eps: as for `rms_norm`, of the sum.

    Returns:
        (normed, summed), both of the input's shape and the promoted dtype, contiguous.

    Raises:
        TypeError: an integer input or residual. ValueError: a shape does not fit.
    """
    shape = _check("add_rms_norm", input, residual, normalized_shape, weight, None)
    if eps is None:
        eps = default_eps(torch.promote_types(input.dtype, residual.dtype))
    if len(shape) == 1:
        normed, summed, _ = _add_rms_norm(input, residual, weight, eps)
        return normed, summed
    normed, summed, _ = _add_rms_norm(*flatten_norm(shape, input, residual, weight), eps)
    return normed.reshape(input.shape), summed.reshape(input.shape)
