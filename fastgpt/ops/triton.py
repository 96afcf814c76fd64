"""The engine `triton`: registers the kernels of fastgpt.kernels as implementations of the ops, and says what they cover.

Covered are float32, float16 and bfloat16 on CUDA devices of compute capability 8.0 and newer, and on the CPU in Triton's interpreter
(TRITON_INTERPRET=1 before the first import of triton), which is for tests. Everything else raises NotCovered, and the formula takes it.
Importing this module does not import triton; the first use of the engine does.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.backend import NotCovered, implement

MIN_CAPABILITY = (8, 0)


def unavailable() -> str | None:
    """Why the engine cannot run in this process, or None where it can."""
    try:
        launch = importlib.import_module("fastgpt.kernels.launch")
    except ImportError as error:
        return f"triton does not import: {error}"
    if launch.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        return f"the device's compute capability is {capability}, needed is {MIN_CAPABILITY} or newer"
    return None


def _run(module: str, function: str, tensors: tuple[Tensor | None, ...], *args: Any) -> Any:
    """Call fastgpt.kernels.<module>.<function> on the tensors' device; NotCovered for dtypes and devices that it does not take."""
    kernels = importlib.import_module(f"fastgpt.kernels.{module}")
    launch = importlib.import_module("fastgpt.kernels.launch")
    device = next(x.device for x in tensors if x is not None)
    if device.type != ("cpu" if launch.INTERPRETED else "cuda"):
        raise NotCovered(f"a tensor on {device.type}")
    for x in tensors:
        if x is not None and x.is_floating_point() and x.dtype not in launch.DTYPES:
            raise NotCovered(f"dtype {x.dtype}; covered are float32, float16 and bfloat16")
        if x is not None and x.device != device:
            raise NotCovered(f"tensors on {device} and {x.device}")
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return getattr(kernels, function)(*args)
    with torch.cuda.device(device):  # a kernel is launched on the current device
        return getattr(kernels, function)(*args)


@implement("softmax", "triton")
def _softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return _run("softmax", "softmax", (x, mask), x, mask, scale, is_causal)


@implement("softmax_backward", "triton")
def _softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    return _run("softmax", "softmax_backward", (grad, y), grad, y, scale)


def _activation(name: str) -> None:
    """Register an activation and its gradient; gelu's further argument chooses between two kinds."""

    def kind(options: tuple[str, ...]) -> str:
        return "gelu_tanh" if options == ("tanh",) else name

    @implement(name, "triton")
    def forward(x: Tensor, *options: str) -> Tensor:
        return _run("activation", "activation", (x,), kind(options), x)

    @implement(f"{name}_backward", "triton")
    def backward(grad: Tensor, saved: Tensor, *options: str) -> Tensor:
        return _run("activation", "activation_backward", (grad, saved), kind(options), grad, saved)


for _name in ("relu", "sigmoid", "tanh", "silu", "gelu"):
    _activation(_name)


def _gated(name: str) -> None:
    """Register swiglu or geglu and its gradient; geglu's further argument chooses between two gelus."""

    def kind(options: tuple[str, ...]) -> str:
        return "silu" if not options else "gelu_tanh" if options[0] == "tanh" else "gelu"

    def covers(gate: Tensor, *others: Tensor | None) -> None:
        for x in others:
            if x is not None and x.dtype != gate.dtype:
                raise NotCovered(f"mixed dtypes {gate.dtype} and {x.dtype}")

    @implement(name, "triton")
    def forward(gate: Tensor, up: Tensor | None, *options: str) -> Tensor:
        covers(gate, up)
        return _run("swiglu", "gated", (gate, up), kind(options), gate, up)

    @implement(f"{name}_backward", "triton")
    def backward(grad: Tensor, gate: Tensor, up: Tensor | None, *options: str) -> tuple[Tensor, Tensor]:
        covers(gate, up, grad)
        return _run("swiglu", "gated_backward", (grad, gate, up), kind(options), grad, gate, up)


for _name in ("swiglu", "geglu"):
    _gated(_name)


def _norm(function: str, x: Tensor, tensors: tuple[Tensor | None, ...], *args: Any) -> Any:
    if x.shape[-1] == 0:
        raise NotCovered("rows without columns")
    return _run("layer_norm", function, tensors, *args)


@implement("layer_norm", "triton")
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm("layer_norm", x, (x, weight, bias), x, weight, bias, eps)


@implement("layer_norm_backward", "triton")
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (grad, x, weight, mean, rstd)
    return _norm("layer_norm_backward", x, tensors, *tensors, needs_params)


@implement("rms_norm", "triton")
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _norm("rms_norm", x, (x, weight), x, weight, eps)


@implement("rms_norm_backward", "triton")
def _rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return _norm("layer_norm_backward", x, (grad, x, weight, rstd), grad, x, weight, None, rstd, needs_weight)[:2]


@implement("add_layer_norm", "triton")
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, residual, weight, bias)
    return _norm("add_layer_norm", x, tensors, *tensors, eps)


@implement("add_layer_norm_backward", "triton")
def _add_layer_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (grad, grad_sum, summed, weight, mean, rstd)
    return _norm("add_norm_backward", summed, tensors, *tensors, needs_params, needs_half)


@implement("add_rms_norm", "triton")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm("add_rms_norm", x, (x, residual, weight), x, residual, weight, eps)


@implement("add_rms_norm_backward", "triton")
def _add_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor | None, summed: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool, needs_half: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (grad, grad_sum, summed, weight, None, rstd)
    return _norm("add_norm_backward", summed, tensors, *tensors, needs_weight, needs_half)[:3]


def _cross_entropy_covers(logits: Tensor) -> None:
    if logits.shape[1] == 0:
        raise NotCovered("logits without classes")


@implement("cross_entropy", "triton")
def _cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    _cross_entropy_covers(logits)
    options = (ignore_index, reduction, label_smoothing, z_loss)
    return _run("cross_entropy", "cross_entropy", (logits, target), logits, target, *options)


@implement("cross_entropy_backward", "triton")
def _cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    _cross_entropy_covers(logits)
    checked = (grad, logits, target)  # not lse, which is float64
    options = (ignore_index, reduction, label_smoothing, z_loss)
    return _run("cross_entropy", "cross_entropy_backward", checked, grad, logits, target, lse, *options)


def _attention_options(tensors: tuple[Tensor, ...], is_causal: bool, scale: float, options: tuple[Any, ...]) -> Any:
    """What the kernels take of an op's arguments after scale; NotCovered for what they do not do."""
    tiles = importlib.import_module("fastgpt.kernels.attention_tiles")
    made = tiles.Options(is_causal, scale, *options)
    if len({x.dtype for x in tensors}) > 1:
        raise NotCovered(f"mixed dtypes {[x.dtype for x in tensors]}")
    if tensors[0].shape[-1] > tiles.MAX_DIM:
        raise NotCovered(f"a head size of {tensors[0].shape[-1]}; covered are sizes up to {tiles.MAX_DIM}")
    if made.dropout_p >= 1.0:
        raise NotCovered("dropout_p = 1")
    return made


@implement("attention", "triton")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, *options: Any
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value)
    made = _attention_options(tensors, is_causal, scale, options)
    checked = (*tensors, made.seed, made.cu_seqlens_q, made.cu_seqlens_k)
    return _run("attention", "attention", checked, *tensors, made)


@implement("attention_backward", "triton")
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = _attention_options((grad, query, key, value, out), is_causal, scale, options)
    tensors = (grad, query, key, value, out, lse)
    checked = (*tensors, made.seed, made.cu_seqlens_q, made.cu_seqlens_k)
    return _run("attention_backward", "attention_backward", checked, *tensors, made)


@implement("attention_decode", "triton")
def _attention_decode(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, starts: Tensor | None, ends: Tensor | None, is_causal: bool,
    scale: float, window_left: int = -1, window_right: int = -1, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    options = (0.0, None, window_left, window_right, softcap)
    made = _attention_options((query, key, value), is_causal, scale, options)
    tensors = (query, key, value, rows, starts, ends)
    return _run("attention_decode", "attention_decode", tensors, *tensors, made)[0]


@implement("cross_entropy_inplace", "triton")
def _cross_entropy_inplace(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> Tensor:
    _cross_entropy_covers(logits)
    if not logits.is_contiguous():
        raise NotCovered("strides; covered are contiguous logits")
    options = (ignore_index, reduction, label_smoothing, z_loss)
    loss, lse = _run("cross_entropy", "cross_entropy", (logits, target), logits, target, *options)
    one = torch.ones_like(loss)
    _run("cross_entropy", "cross_entropy_backward", (logits,), one, logits, target, lse, *options, logits)
    return loss


@implement("linear_cross_entropy", "triton")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, dtype: torch.dtype,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if 0 in weight.shape:
        raise NotCovered(f"weights of shape {tuple(weight.shape)}")
    if dtype not in importlib.import_module("fastgpt.kernels.launch").DTYPES:
        raise NotCovered(f"logits of {dtype}")
    options = (ignore_index, reduction, label_smoothing, dtype, keeps)
    return _run("linear_cross_entropy", "linear_cross_entropy", (x, weight, target), x, weight, target, *options)


def _whole(tensors: list[Tensor], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """The optimizer's kernels read tensors by their addresses."""
    for x in tensors:
        if x.dtype not in dtypes or not x.is_contiguous():
            raise NotCovered(f"{x.dtype}{'' if x.is_contiguous() else ', strided'}; covered are contiguous {dtypes}")
    if len({x.dtype for x in tensors}) > 1:
        raise NotCovered("shadows of several dtypes")


@implement("grad_norm", "triton")
def _grad_norm(grads: list[Tensor]) -> Tensor:
    _whole(grads)
    return _run("adamw", "grad_norm", tuple(grads), grads)


@implement("adamw", "triton")
def _adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], weight_decays: list[float],
    lr: float, beta1: float, beta2: float, eps: float, grad_scale: float, step: int, shadows: list[Tensor], zero_grads: bool,
) -> None:  # fmt: skip
    state = [*params, *grads, *exp_avgs, *exp_avg_sqs]
    _whole(state)
    _whole(shadows, (torch.float16, torch.bfloat16))
    options = (weight_decays, lr, beta1, beta2, eps, grad_scale, step, shadows, zero_grads)
    _run("adamw", "adamw", (*state, *shadows), params, grads, exp_avgs, exp_avg_sqs, *options)


@implement("log_softmax", "triton")
def _log_softmax(x: Tensor) -> Tensor:
    if x.shape[-1] == 0:
        raise NotCovered("rows without columns")
    return _run("log_softmax", "log_softmax", (x,), x)


@implement("log_softmax_backward", "triton")
def _log_softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    if y.shape[-1] == 0:
        raise NotCovered("rows without columns")
    return _run("log_softmax", "log_softmax_backward", (grad, y), grad, y)


@implement("dropout", "triton")
def _dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    if p >= 1.0:
        raise NotCovered("p = 1")
    return _run("dropout", "dropout", (x, residual, seed), x, residual, seed, p)


@implement("rope", "triton")
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return _run("rope", "rope", (x, cos, sin), x, cos, sin, interleaved, inverse)


@implement("bias_activation", "triton")
def _bias_activation(x: Tensor, bias: Tensor, kind: str) -> Tensor:
    return _run("bias_activation", "bias_activation", (x, bias), x, bias, kind)


@implement("bias_activation_backward", "triton")
def _bias_activation_backward(
    grad: Tensor, saved: Tensor, bias: Tensor, kind: str, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    tensors = (grad, saved, bias)
    return _run("bias_activation", "bias_activation_backward", tensors, *tensors, kind, needs_bias)


@implement("embedding", "triton")
def _embedding(input_ids: Tensor, weight: Tensor, padding_idx: int, accumulate_grad: bool) -> Tensor:
    return _run("embedding", "embedding", (weight, input_ids), input_ids, weight)


@implement("embedding_backward", "triton")
def _embedding_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    return _run("embedding", "embedding_backward", (grad, input_ids), grad, input_ids, rows, padding_idx)


@implement("embedding_accumulate_backward", "triton")
def _embedding_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int) -> None:
    if not into.is_contiguous():
        raise NotCovered("a gradient that is not contiguous")
    _run("embedding", "embedding_accumulate", (into, grad, input_ids), into, grad, input_ids, padding_idx)
