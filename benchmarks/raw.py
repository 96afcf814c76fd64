"""fastgpt's C++ kernels writing into memory that is there already, to be compared with torch's `out=`.

A fresh result of many megabytes is mapped page by page at its first touch, which for pointwise ops costs more than the computation;
`out=` on both sides leaves that out. For benchmarks only: shapes, dtypes and contiguity are not checked here.
"""

from torch import Tensor

from fastgpt.ops import cpu
from fastgpt.ops.bias_activation import KINDS


def softmax(x: Tensor, y: Tensor) -> Tensor:
    """softmax over the last of two dimensions, into y."""
    rows, cols = x.shape
    code, strides = cpu.dtype_code(x), [0, 0, 0]
    cpu.kernels.softmax(
        code, x.data_ptr(), 0, strides, y.data_ptr(), 1, 1, rows, cols, 1.0, False, cpu.threads()
    )  # fmt: skip
    return y


def softmax_backward(grad: Tensor, y: Tensor, dx: Tensor) -> Tensor:
    """The input's gradient, into dx."""
    rows, cols = y.shape
    cpu.kernels.softmax_backward(
        cpu.dtype_code(y), grad.data_ptr(), y.data_ptr(), dx.data_ptr(), rows, cols, 1.0, cpu.threads()
    )
    return dx


def activation(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """relu, sigmoid, tanh, gelu, gelu_tanh or silu, into y."""
    cpu.kernels.activation(KINDS[kind], cpu.dtype_code(x), x.data_ptr(), y.data_ptr(), x.numel(), cpu.threads())
    return y


def activation_backward(kind: str, grad: Tensor, saved: Tensor, dx: Tensor) -> Tensor:
    """The input's gradient, into dx; `saved` is the result of relu, sigmoid and tanh, the input of the others."""
    cpu.kernels.activation_backward(
        KINDS[kind],
        cpu.dtype_code(grad),
        grad.data_ptr(),
        saved.data_ptr(),
        dx.data_ptr(),
        grad.numel(),
        cpu.threads(),
    )
    return dx
