"""CUDA kernels on device addresses (csrc/python/cuda.cpp); every launcher's last argument is a stream, as CUDA's number of it."""

from collections.abc import Callable, Sequence

def why_no_device() -> str | None: ...
def compiler() -> str: ...
def set_compiler(compile: Callable[[str, int, int], tuple[str, bytes]]) -> None: ...
def softmax(
    type: int, x: int, y_in: int, y: int, mask: int, mask_stride: Sequence[int], batch: int, heads: int, queries: int, cols: int,
    scale: float, causal: bool, log: bool, backward: bool, stream: int,
) -> None: ...  # fmt: skip
def activation(kind: int, type: int, x: int, y: int, n: int, stream: int) -> None: ...
def activation_backward(kind: int, type: int, grad: int, kept: int, dx: int, n: int, stream: int) -> None: ...
def dropout(
    x_type: int, type: int, x: int, residual: int, y: int, n: int, seed: int, threshold: int, scale: float, stream: int
) -> None: ...
def swiglu(
    kind: int,
    type: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    y: int,
    rows: int,
    cols: int,
    stream: int,
) -> None: ...
def swiglu_backward(
    kind: int, type: int, grad: int, gate: int, gate_stride: int, up: int, up_stride: int, dgate: int, dup: int, out_stride: int,
    rows: int, cols: int, stream: int,
) -> None: ...  # fmt: skip

_Stride = tuple[int, ...]  # of batch, head and row, in elements

def attention(
    chip: int, type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride,
    out: int, out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool, stream: int,
) -> None: ...  # fmt: skip
def attention_backward(
    chip: int, type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride,
    out: int, out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool, grad: int, grad_stride: _Stride,
    grad_query: int, grad_query_stride: _Stride, grad_key: int, grad_key_stride: _Stride, grad_value: int,
    grad_value_stride: _Stride, delta: int, stream: int,
) -> None: ...  # fmt: skip
def attention_decode(
    type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride, out: int,
    out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool, splits: int, keys_per_split: int,
    part: int, part_lse: int, stream: int,
) -> None: ...  # fmt: skip
