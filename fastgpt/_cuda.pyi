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
def norm(
    x_type: int, type: int, param_type: int, x: int, residual: int, weight: int, bias: int, summed: int, y: int, mean: int, rstd: int,
    rows: int, cols: int, eps: float, stream: int,
) -> None: ...  # fmt: skip
def norm_backward(
    type: int, param_type: int, grad: int, grad_sum: int, s: int, weight: int, mean: int, rstd: int, dx: int, dx_half: int,
    dweight: int, dbias: int, parts: int, part_count: int, rows: int, cols: int, stream: int,
) -> None: ...  # fmt: skip
def count_targets(target: int, counted: int, rows: int, ignore_index: int, stream: int) -> None: ...
def cross_entropy(
    type: int, logits: int, target: int, losses: int, loss: int, lse: int, count: int, dlogits: int, rows: int, cols: int,
    ignore_index: int, smoothing: float, z_loss: float, stream: int,
) -> None: ...  # fmt: skip
def cross_entropy_backward(
    type: int, logits: int, target: int, grad: int, grad_rows: bool, lse: int, count: int, dlogits: int, rows: int, cols: int,
    ignore_index: int, smoothing: float, z_loss: float, stream: int,
) -> None: ...  # fmt: skip
def scale_rows(type: int, x: int, factor: int, factor_rows: bool, rows: int, cols: int, stream: int) -> None: ...
def bias_activation(
    kind: int, type: int, bias_type: int, x: int, bias: int, y: int, part_count: int, rows: int, cols: int, stream: int
) -> None: ...
def bias_activation_backward(
    kind: int, type: int, bias_type: int, grad: int, kept: int, bias: int, dx: int, dbias: int, parts: int, part_count: int, rows: int,
    cols: int, stream: int,
) -> None: ...  # fmt: skip
def grad_norm(
    type: int, first_chunk: int, sizes: int, count: int, chunks: int, grads: int, parts: int, norm: int, stream: int
) -> None: ...
def adamw(
    shadow_type: int, first_chunk: int, sizes: int, count: int, chunks: int, params: int, grads: int, exp_avgs: int, exp_avg_sqs: int,
    shadows: int, decays: int, beta1: float, beta2: float, eps: float, grad_scale: float, step_size: float, root_correction: float,
    zero_grads: bool, stream: int,
) -> None: ...  # fmt: skip
def embedding(type: int, ids: int, weight: int, y: int, count: int, rows: int, cols: int, stream: int) -> None: ...
def embedding_backward(
    grad_type: int, type: int, ids: int, positions: int, grad: int, into: int, count: int, rows: int, cols: int, padding: int,
    keep: bool, stream: int,
) -> None: ...  # fmt: skip
def rope(
    type: int, x: int, y: int, cos: int, sin: int, x_batch: int, x_head: int, x_position: int, y_batch: int, y_head: int,
    y_position: int, batch: int, heads: int, length: int, head_dim: int, pairs: int, interleaved: bool, inverse: bool, stream: int,
) -> None: ...  # fmt: skip

_Stride = tuple[int, ...]  # of batch, head and row, in elements

def attention(
    chip: int, type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride,
    out: int, out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool,
    options: tuple[int | float, ...], stream: int,
) -> None: ...  # fmt: skip
def attention_backward(
    chip: int, type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride,
    out: int, out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool,
    options: tuple[int | float, ...], grad: int, grad_stride: _Stride, grad_query: int, grad_query_stride: _Stride,
    grad_key: int, grad_key_stride: _Stride, grad_value: int, grad_value_stride: _Stride, delta: int, sums: int, stream: int,
) -> None: ...  # fmt: skip
def attention_decode(
    type: int, query: int, query_stride: _Stride, key: int, key_stride: _Stride, value: int, value_stride: _Stride, out: int,
    out_stride: _Stride, lse: int, sizes: tuple[int, ...], scale: float, causal: bool, splits: int, keys_per_split: int,
    part: int, part_lse: int, stream: int,
) -> None: ...  # fmt: skip
