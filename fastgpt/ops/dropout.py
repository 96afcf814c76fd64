"""Dropout (arXiv 1207.0580) with the mask made from a seed by Philox, alone or with a residual added. Formula in reference/.

Nothing is stored for the backward but the seed: it makes the same mask again. No feature-wise or in-place dropout.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define

MAX_SEED = 2**63 - 1


def threshold(p: float) -> int:
    """Words of Philox below it are dropped: p 2^32, rounded; at most 2^32 - 1."""
    return min(round(p * 2**32), 2**32 - 1)


def _cpu(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    from fastgpt.ops import cpu

    if p >= 1.0:
        raise NotCovered("p = 1")
    x_code, code = cpu.dtype_code(x), cpu.dtype_code(x if residual is None else residual)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = cpu.empty(x.shape, x.dtype if residual is None else residual.dtype)
    cpu.kernels.dropout(
        x_code,
        code,
        x.data_ptr(),
        cpu.address(residual),
        y.data_ptr(),
        x.numel(),
        int(seed) & (2**64 - 1),
        threshold(p),
        1.0 / (1.0 - p),
        cpu.threads(),
    )
    return y


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.dtype = p, x.dtype
        y: Tensor = below_autograd(_dropout, x, residual, seed, p)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        needs_x, needs_residual, _seed, _p = ctx.needs_input_grad
        dx = _dropout(grad.to(ctx.dtype), None, seed, ctx.p) if needs_x else None
        return dx, grad if needs_residual else None, None, None


_dropout = define(
    "dropout(Tensor x, Tensor? residual, Tensor seed, float p) -> Tensor",
    fake=lambda x, residual, seed, p: torch.empty_like(
        x if residual is None else residual, memory_format=torch.contiguous_format
    ),
    reference=lambda *args: reference.dropout(*args).contiguous(),
    cpu=_cpu,
    autograd=_Rule,
)


def draw_seed(name: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a scalar int64 tensor: the one given, or one from torch's default generator of the device."""
    if seed is None:
        return torch.randint(MAX_SEED, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(f"{name}: seed is {seed.dtype} of shape {tuple(seed.shape)}, expected a scalar int64")
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{name}: seed is a {type(seed).__name__}, expected an int, a scalar int64 tensor or None")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{name}: seed is {seed}, expected 0 to 2^63 - 1")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check(name: str, input: Tensor, p: float) -> None:
    if not input.is_floating_point():
        raise TypeError(f"{name}: input has dtype {input.dtype}, expected a floating-point dtype")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: p is {p}, expected 0 to 1")


def dropout(input: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None) -> Tensor:
    """input / (1 - p) where an element is kept, 0 where it is dropped, which has probability p.

    Element i of the contiguous input is dropped where word i % 4 of philox4x32_10(counter = i // 4, key = seed) is below p 2^32
    (counter and key as their low and high 32 bits; the counter's upper 64 bits are 0). So a seed gives the same mask with every
    engine and any number of threads, and the backward makes it again instead of storing it.

    Args:
        input: any shape, any floating dtype.
        p: probability of an element to be dropped, 0 to 1.
        training: the input itself is returned where it is false (or p is 0).
        seed: 0 to 2^63 - 1, or a scalar int64 tensor; None draws one from torch's default generator (torch.manual_seed repeats it).

    Returns:
        The input's shape and dtype, contiguous. NaN and infinities stay (as NaN) where they are dropped, as in torch.

    Raises:
        TypeError: an integer input or a seed of another type. ValueError: p or the seed out of range.

    >>> bool((dropout(torch.ones(64), 0.5, seed=1) == dropout(torch.ones(64), 0.5, seed=1)).all())
    True
    """
    _check("dropout", input, p)
    if not training or p == 0.0:
        return input
    y: Tensor = _dropout(input, None, draw_seed("dropout", seed, input.device), p)
    return y


def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True, *, seed: int | Tensor | None = None
) -> Tensor:
    """residual + dropout(input, p) in one pass; the sum is rounded once.

    Args:
        input: any shape, any floating dtype.
        residual: the input's shape and dtype, or float32 with a half-type input.
        p, training, seed: as in `dropout`, and the same mask.

    Returns:
        The residual's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: as in `dropout`; a residual of another shape or a dtype that does not fit.

    >>> dropout_add(torch.ones(2), torch.ones(2), 0.5, training=False)
    tensor([2., 2.])
    """
    _check("dropout_add", input, p)
    if residual.shape != input.shape:
        raise ValueError(
            f"dropout_add: residual has shape {tuple(residual.shape)}, expected the input's, {tuple(input.shape)}"
        )
    if residual.dtype not in (input.dtype, torch.float32) or (
        residual.dtype != input.dtype and input.dtype == torch.float64
    ):
        raise TypeError(f"dropout_add: residual has dtype {residual.dtype}, expected {input.dtype} or torch.float32")
    if not training or p == 0.0:
        return residual + input
    y: Tensor = _dropout(input, residual, draw_seed("dropout_add", seed, input.device), p)
    return y
