"""C++ SIMD kernels on raw addresses; use fastgpt.ops instead.

Addresses are integers (0 for none), strides and sizes count elements, `dtype` is 0 (float32) or 1 (bfloat16), strides are those of
batch, head and time. Arguments are positional. Sources: csrc/python/cpu.cpp and csrc/cpu/kernels.h.
"""

from collections.abc import Sequence

def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def activation(kind: int, dtype: int, x: int, y: int, n: int, threads: int, /) -> None: ...
def activation_backward(kind: int, dtype: int, dy: int, saved: int, dx: int, n: int, threads: int, /) -> None: ...
def swiglu(
    kind: int,
    dtype: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    y: int,
    rows: int,
    cols: int,
    threads: int,
    /,
) -> None: ...
def swiglu_backward(
    kind: int,
    dtype: int,
    dy: int,
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    dgate: int,
    dup: int,
    grad_stride: int,
    rows: int,
    cols: int,
    threads: int,
    /,
) -> None: ...
def bias_activation(
    kind: int, dtype: int, bias_dtype: int, x: int, bias: int, y: int, rows: int, cols: int, threads: int, /
) -> None: ...
def bias_activation_backward(
    kind: int,
    dtype: int,
    bias_dtype: int,
    dy: int,
    saved: int,
    bias: int,
    dx: int,
    dbias: int,
    rows: int,
    cols: int,
    threads: int,
    /,
) -> None: ...
def softmax(
    dtype: int,
    x: int,
    mask: int,
    mask_stride: Sequence[int],
    y: int,
    batch: int,
    heads: int,
    queries: int,
    cols: int,
    scale: float,
    causal: bool,
    threads: int,
    /,
) -> None: ...
def softmax_backward(
    dtype: int, dy: int, y: int, dx: int, rows: int, cols: int, scale: float, threads: int, /
) -> None: ...
def layer_norm(
    dtype: int,
    x_dtype: int,
    param_dtype: int,
    x: int,
    residual: int,
    weight: int,
    bias: int,
    sum: int,
    y: int,
    mean: int,
    rstd: int,
    rows: int,
    cols: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def layer_norm_backward(
    dtype: int,
    param_dtype: int,
    dy: int,
    dsum: int,
    x: int,
    weight: int,
    mean: int,
    rstd: int,
    dx: int,
    dx_half: int,
    dweight: int,
    dbias: int,
    rows: int,
    cols: int,
    threads: int,
    /,
) -> None: ...
def count_targets(target: int, rows: int, classes: int, ignore_index: int, /) -> int: ...
def cross_entropy(
    dtype: int,
    logits: int,
    target: int,
    losses: int,
    lse: int,
    rows: int,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    threads: int,
    /,
) -> None: ...
def cross_entropy_backward(
    dtype: int,
    logits: int,
    target: int,
    lse: int,
    grad: int,
    grad_stride: int,
    grad_scale: float,
    dlogits: int,
    rows: int,
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    threads: int,
    /,
) -> None: ...
def attention(
    dtype: int,
    q: int,
    q_stride: Sequence[int],
    k: int,
    k_stride: Sequence[int],
    v: int,
    v_stride: Sequence[int],
    o: int,
    o_stride: Sequence[int],
    lse: int,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    dim: int,
    scale: float,
    causal: bool,
    threads: int,
    /,
) -> None: ...
def attention_backward(
    dtype: int,
    q: int,
    q_stride: Sequence[int],
    k: int,
    k_stride: Sequence[int],
    v: int,
    v_stride: Sequence[int],
    o: int,
    o_stride: Sequence[int],
    do: int,
    do_stride: Sequence[int],
    dq: int,
    dq_stride: Sequence[int],
    dk: int,
    dk_stride: Sequence[int],
    dv: int,
    dv_stride: Sequence[int],
    lse: int,
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    dim: int,
    scale: float,
    causal: bool,
    threads: int,
    /,
) -> None: ...
def grad_norm(grads: Sequence[int], sizes: Sequence[int], threads: int, /) -> float: ...
def adamw(
    params: Sequence[int],
    grads: Sequence[int],
    exp_avgs: Sequence[int],
    exp_avg_sqs: Sequence[int],
    sizes: Sequence[int],
    weight_decays: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
    step: int,
    threads: int,
    /,
) -> None: ...
