"""Gated linear units without their matrix products (arXiv 2002.05202, equations 5 and 6): swiglu and geglu.

Formulas in reference/. Gate and up may be the two halves of one tensor, as one matrix product for both leaves them: their rows
are read where they are, and with `swiglu(both)` the gradient is one tensor too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt.ops import reference
from fastgpt.ops.backend import NotCovered, below_autograd, define
from fastgpt.ops.bias_activation import KINDS


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """The tensor, copied only where its rows are not evenly apart, and the step from row to row in elements."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        step = x.stride(-2) if x.dim() > 1 else x.shape[-1]
        evenly = all(x.stride(d) == x.stride(d + 1) * x.shape[d + 1] for d in range(x.dim() - 2))
        if evenly:
            return x, step
    return x.contiguous(), x.shape[-1]


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    size = gate.shape[-1] // 2
    return gate[..., :size], gate[..., size:]


def _kind(options: tuple[str, ...]) -> int:
    return KINDS["silu" if not options else "gelu_tanh" if options[0] == "tanh" else "gelu"]


def _geometry(y: Tensor, *strides: int) -> tuple[int, int]:
    """Rows and columns; all elements as one row where every tensor is contiguous."""
    cols = y.shape[-1]
    return (1, y.numel()) if all(stride == cols for stride in strides) else (y.numel() // cols, cols)


def _cpu(gate: Tensor, up: Tensor | None, *options: str) -> Tensor:
    from fastgpt.ops import cpu

    code = cpu.dtype_code(gate)
    gate, up = _halves(gate, up)
    if gate.dtype != up.dtype:
        raise NotCovered(f"gate {gate.dtype} with up {up.dtype}")
    y = cpu.empty(gate.shape, gate.dtype)
    if y.numel() == 0:
        return y
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    rows, cols = _geometry(y, gate_stride, up_stride)
    cpu.kernels.swiglu(
        _kind(options), code, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, y.data_ptr(), rows, cols,
        cpu.threads(),
    )  # fmt: skip
    return y


def _cpu_backward(grad: Tensor, gate: Tensor, up: Tensor | None, *options: str) -> tuple[Tensor, Tensor]:
    from fastgpt.ops import cpu

    code, packed = cpu.dtype_code(gate), up is None
    left, right = _halves(gate, up)
    for name, x in (("up", right), ("a gradient", grad)):
        if x.dtype != gate.dtype:
            raise NotCovered(f"gate {gate.dtype} with {name} of {x.dtype}")
    dgate = cpu.empty(gate.shape, gate.dtype)
    dup = cpu.empty((0,) if packed else right.shape, gate.dtype)
    if grad.numel() == 0:
        return dgate, dup
    grad = grad.contiguous()
    (left, left_stride), (right, right_stride) = _rows(left), _rows(right)
    into, size = dgate.data_ptr(), right.shape[-1]
    grad_stride = dgate.shape[-1]
    rows, cols = _geometry(grad, left_stride, right_stride, grad_stride)
    cpu.kernels.swiglu_backward(
        _kind(options), code, grad.data_ptr(), left.data_ptr(), left_stride, right.data_ptr(), right_stride, into,
        into + size * dgate.element_size() if packed else dup.data_ptr(), grad_stride, rows, cols, cpu.threads(),
    )  # fmt: skip
    return dgate, dup


def _fake(gate: Tensor, up: Tensor | None, *_: str) -> Tensor:
    size = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    return gate.new_empty((*gate.shape[:-1], size))


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None, *_: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


def _reference(name: str) -> Any:
    return lambda gate, up, *options: getattr(reference, name)(gate, up, *options).contiguous()


def _reference_backward(name: str) -> Any:
    return lambda *args: tuple(result.contiguous() for result in getattr(reference, name)(*args))


class _Rule(torch.autograd.Function):
    """Of both ops: geglu has one argument more, `approximate`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, *options: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.options = options
        y: Tensor = below_autograd(_geglu if options else _swiglu, gate, up, *options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        backward = _geglu_backward if ctx.options else _swiglu_backward
        dgate, dup = backward(grad, gate, up, *ctx.options)
        needs_gate, needs_up = ctx.needs_input_grad[:2]
        return dgate if needs_gate else None, dup if needs_up else None, *(None for _ in ctx.options)


_swiglu = define(
    "swiglu(Tensor gate, Tensor? up) -> Tensor",
    fake=_fake,
    reference=_reference("swiglu"),
    cpu=_cpu,
    autograd=_Rule,
)
_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    fake=_fake_backward,
    reference=_reference_backward("swiglu_backward"),
    cpu=_cpu_backward,
)
_geglu = define(
    "geglu(Tensor gate, Tensor? up, str approximate) -> Tensor",
    fake=_fake,
    reference=_reference("geglu"),
    cpu=_cpu,
    autograd=_Rule,
)
_geglu_backward = define(
    "geglu_backward(Tensor grad, Tensor gate, Tensor? up, str approximate) -> (Tensor, Tensor)",
    fake=_fake_backward,
    reference=_reference_backward("geglu_backward"),
    cpu=_cpu_backward,
)


def _check(op: str, gate: Tensor, up: Tensor | None) -> None:
    for name, x in (("gate", gate), ("up", up)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected a floating-point dtype")
    if gate.dim() == 0:
        raise ValueError(f"{op}: gate is a scalar, expected one dimension or more")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: without `up` the gate holds both halves; got shape {tuple(gate.shape)}, expected an even last size"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up has shape {tuple(up.shape)}, expected the gate's {tuple(gate.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up has dtype {up.dtype}, expected the gate's {gate.dtype}")


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up of every element, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        gate, up: of one shape and floating dtype. Rows evenly apart, such as the halves of one tensor, are not copied. Without `up`
            the gate is (..., 2 C), its first half the gate and its second half up; the gradient is then one tensor too, which spares
            putting two together.

    Returns:
        (..., C), the gate's dtype, contiguous.

    Raises:
        TypeError: an integer tensor, or two dtypes. ValueError: two shapes, or an odd last size without `up`.

    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    _check("swiglu", gate, up)
    return _swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(gate) * up of every element; shapes, dtypes and errors as for `swiglu`, `approximate` as for `gelu`.

    >>> geglu(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
    tensor([0.0000, 1.6827])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    _check("geglu", gate, up)
    return _geglu(gate, up, approximate)
