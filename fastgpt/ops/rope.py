"""Rotary position embedding (RoPE, arXiv 2104.09864). Formula in reference/.

Queries and keys turn by angles that grow with the position, so that their products depend on the distance between positions only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import below_autograd, define


def _empty(x: Tensor) -> Tensor:
    """A (B, H, T, D) tensor with the memory of (B, T, H, D), which is how projections leave heads."""
    B, H, T, D = x.shape
    return x.new_empty((B, T, H, D)).transpose(1, 2)


def _cpu(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    y = _empty(x)
    B, H, T, D = x.shape
    cpu.kernels.rope(
        code, x.data_ptr(), x.stride()[:3], y.data_ptr(), y.stride()[:3], cos.data_ptr(), sin.data_ptr(),
        B, H, T, D, 2 * cos.shape[-1], interleaved, inverse, cpu.threads(),
    )  # fmt: skip
    return y


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.options = interleaved, not inverse
        y: Tensor = below_autograd(_rope, x, cos, sin, interleaved, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _rope(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_rope = define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    fake=lambda x, *_: _empty(x),
    reference=reference.rope,
    cpu=_cpu,
    autograd=_Rule,
)


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn the pairs of every head's first 2 P elements by their position's angles, computed in fp32 (fp64 for fp64).

        y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin

    Args:
        x: queries or keys (B, H, T, D), any floating dtype; any strides, without a copy where D is contiguous.
        cos, sin: (T, P), 2 P <= D, as `rope_tables` makes them; rows start:start + T of longer tables for positions from `start` on.
            Constants: they get no gradient. Elements from 2 P on stay as they are.
        interleaved: False for the pairs (i, i + P) of GPT-NeoX and Llama in Hugging Face's form, True for (2i, 2i + 1) of the paper
            and GPT-J.

    Returns:
        x's shape and dtype, laid out as (B, T, H, D). The gradient is the inverse turn.

    Raises:
        TypeError: an integer tensor. ValueError: shapes that do not fit, or tables that require a gradient.

    >>> cos, sin = rope_tables(2, 3)
    >>> rope(torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2), cos, sin)[0, 0, 2]
    tensor([-0.4161,  0.9093])
    """
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise TypeError(f"rope: {name} has dtype {tensor.dtype}, expected a floating-point dtype")
    if x.dim() != 4:
        raise ValueError(f"rope: x has shape {tuple(x.shape)}, expected (B, H, T, D)")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dim() != 2 or tensor.shape != cos.shape or tensor.shape[0] != x.shape[2]:
            raise ValueError(f"rope: {name} has shape {tuple(tensor.shape)}, expected (T, P) with T = {x.shape[2]}")
        if 2 * tensor.shape[1] > x.shape[3]:
            raise ValueError(
                f"rope: {name} has {tensor.shape[1]} angles a position, expected at most half of D = {x.shape[3]}"
            )
        if tensor.requires_grad:
            raise ValueError(f"rope: {name} requires a gradient, expected a constant table")
    return _rope(x, cos, sin, interleaved, False)


def rope_tables(
    dim: int,
    length: int,
    base: float = 10000.0,
    *,
    start: int = 0,
    scale: float | Tensor = 1.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles scale * position * base^(-2 i / dim), computed in float64, as float32.

    Args:
        dim: how many elements of a head turn, even; a head's width, or less for a partial rotation.
        length: positions, `start` being the first.
        base: of the geometric series of angles; 10000 in the paper, 500000 in Llama 3.
        scale: multiplies positions; a factor below 1 fits longer texts into the trained range (arXiv 2306.15595).
            A (dim / 2) tensor has a factor for each frequency, as Llama 3.1 needs.
        device: of the tables.

    Returns:
        (cos, sin), each (length, dim / 2) float32.

    Raises:
        ValueError: an odd or negative `dim`, a negative length or start.

    >>> cos, sin = rope_tables(4, 2)
    >>> cos[1]
    tensor([0.5403, 0.9999])
    """
    if dim < 0 or dim % 2:
        raise ValueError(f"rope_tables: dim is {dim}, expected an even number")
    if length < 0 or start < 0:
        raise ValueError(f"rope_tables: length is {length} and start {start}, expected 0 or more")
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))
    angles = scale * torch.arange(start, start + length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)
