"""The engine `cuda`: registers the kernels of csrc/cuda as implementations of the ops, and says what they cover.

Covered are float32, float16 and bfloat16 on CUDA devices of compute capability 8.0 and newer. Tensors that are not contiguous are
copied; those that do not begin at a multiple of 16 bytes take a slower way through the same kernels. Kernels run on torch's current
stream of the tensors' device and allocate through torch, so CUDA graphs can hold them.

A kernel whose op is not in VERIFIED has never run on a GPU: compilers and the emulation on a CPU (tests/emu) are all that has seen it.
It is used only where `FASTGPT_BACKEND=cuda` forces the engine or `FASTGPT_CUDA_UNVERIFIED=1` is set.
"""

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import cuda_nvrtc
from fastgpt.ops.backend import NotCovered, implement
from fastgpt.ops.bias_activation import KINDS
from fastgpt.ops.dropout import threshold
from fastgpt.ops.swiglu import _geometry, _halves, _kind, _rows

MIN_CAPABILITY = (8, 0)
VERIFIED: frozenset[str] = frozenset()  # ops whose kernels, backward included, passed their tests on a GPU

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the C++ enum Type
_MAX_COLS = 262_144


@functools.cache
def unavailable() -> str | None:
    """Why the engine cannot run in this process, or None where it can."""
    try:
        kernels = importlib.import_module("fastgpt._cuda")
    except ImportError as error:
        built = f"the extension fastgpt._cuda does not load: {error}"
        return f"{built} (FASTGPT_CUDA=1 at install time says why it is not built)"
    if kernels.compiler() == "nvrtc" and (reason := cuda_nvrtc.unavailable()) is not None:
        return f"the package was installed without nvcc, and its kernels cannot be compiled now: {reason}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"the device's compute capability is {capability}, needed is {MIN_CAPABILITY} or newer"
    if kernels.compiler() == "nvrtc":
        kernels.set_compiler(_compile)
    reason = kernels.why_no_device()
    return reason


def _compile(expression: str, major: int, minor: int) -> tuple[str, bytes]:
    """What the module asks for at a kernel's first launch."""
    return cuda_nvrtc.kernel(expression, cuda_nvrtc.architecture((major, minor)))


def way() -> str | None:
    """How the kernels come to be: by nvcc at install or by NVRTC at first use; None where the extension is not there.

    >>> way() is None or way().startswith("kernels compiled by")
    True
    """
    try:
        compiler = importlib.import_module("fastgpt._cuda").compiler()
    except ImportError:
        return None
    if compiler == "nvcc":
        return "kernels compiled by nvcc with the package"
    missing = cuda_nvrtc.unavailable()
    how = f"NVRTC {cuda_nvrtc.version()}" if missing is None else f"NVRTC, which is missing: {missing}"
    return f"kernels compiled by {how}, each at its first use"


def held_back(op: str) -> str | None:
    """Why the kernels of an op are not chosen without force, or None where they are."""
    if op.removesuffix("_backward") in VERIFIED or os.environ.get("FASTGPT_CUDA_UNVERIFIED", "0") not in ("", "0"):
        return None
    return "its kernel has never run on a GPU (FASTGPT_CUDA_UNVERIFIED=1 or FASTGPT_BACKEND=cuda uses it)"


def _code(x: Tensor) -> int:
    code = _CODES.get(x.dtype)
    if code is None:
        raise NotCovered(f"dtype {x.dtype}; covered are float32, float16 and bfloat16")
    return code


def _launch(name: str, device: torch.device, *args: Any) -> None:
    """Call a launcher on the device's current stream; tensors and None among the arguments go as addresses."""
    launcher = getattr(importlib.import_module("fastgpt._cuda"), name)
    addresses = (x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in args)
    with torch.cuda.device(device):  # a kernel is launched on the current device
        launcher(*addresses, torch.cuda.current_stream(device).cuda_stream)


def _check(*tensors: Tensor | None) -> None:
    """NotCovered unless all tensors lie on one CUDA device."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise NotCovered(f"tensors on {' and '.join(sorted(map(str, devices)))}")


def _same_type(*tensors: Tensor) -> int:
    if len({x.dtype for x in tensors}) > 1:
        raise NotCovered(f"mixed dtypes {[x.dtype for x in tensors]}")
    return _code(tensors[0])


def _softmax_call(
    x: Tensor, y_in: Tensor | None, mask: Tensor | None, scale: float, is_causal: bool, log: bool
) -> Tensor:
    """One of the four kernels of softmax.cuh; `y_in` makes it a backward."""
    _check(x, y_in, mask)
    code = _same_type(x) if y_in is None else _same_type(x, y_in)
    cols = x.shape[-1]
    if cols > _MAX_COLS:
        raise NotCovered(f"rows of {cols} columns; covered are up to {_MAX_COLS}")
    sizes = [1] * (3 - (x.dim() - 1)) + list(x.shape[:-1])
    batch, heads, queries = (x.shape[:-3].numel(), *sizes[-2:])
    strides = [0, 0, 0]
    if mask is not None:
        if mask.dtype == torch.float64:
            raise NotCovered("a float64 mask")
        mask = mask.float().expand(x.shape)
        if cols > 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
        if mask.dim() > 4:
            mask = mask.reshape(batch, heads, queries, cols)
        strides = [0] * (4 - mask.dim()) + list(mask.stride())[:-1]
    x = x.contiguous()
    y_in = None if y_in is None else y_in.contiguous()
    y = torch.empty_like(x)
    _launch(
        "softmax", x.device, code, x.data_ptr(), 0 if y_in is None else y_in.data_ptr(), y.data_ptr(),
        0 if mask is None else mask.data_ptr(), strides, batch, heads, queries, cols, scale, is_causal, log, y_in is not None,
    )  # fmt: skip
    return y


@implement("softmax", "cuda")
def _softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return _softmax_call(x, None, mask, scale, is_causal, False)


@implement("softmax_backward", "cuda")
def _softmax_backward(grad: Tensor, y: Tensor, scale: float) -> Tensor:
    return _softmax_call(grad, y, None, scale, False, False)


@implement("log_softmax", "cuda")
def _log_softmax(x: Tensor) -> Tensor:
    return _softmax_call(x, None, None, 1.0, False, True)


@implement("log_softmax_backward", "cuda")
def _log_softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    return _softmax_call(grad, y, None, 1.0, False, True)


def _activation(name: str) -> None:
    """Register an activation and its gradient; gelu's further argument chooses between two kinds."""

    def kind(options: tuple[str, ...]) -> int:
        return KINDS["gelu_tanh" if options == ("tanh",) else name]

    @implement(name, "cuda")
    def forward(x: Tensor, *options: str) -> Tensor:
        _check(x)
        code = _code(x)
        x = x.contiguous()
        y = torch.empty_like(x)
        _launch("activation", x.device, kind(options), code, x.data_ptr(), y.data_ptr(), x.numel())
        return y

    @implement(f"{name}_backward", "cuda")
    def backward(grad: Tensor, saved: Tensor, *options: str) -> Tensor:
        _check(grad, saved)
        code = _same_type(grad, saved)
        grad, saved = grad.contiguous(), saved.contiguous()
        dx = torch.empty_like(grad)
        addresses = (grad.data_ptr(), saved.data_ptr(), dx.data_ptr())
        _launch("activation_backward", grad.device, kind(options), code, *addresses, grad.numel())
        return dx


for _name in ("relu", "sigmoid", "tanh", "silu", "gelu"):
    _activation(_name)


@implement("dropout", "cuda")
def _dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    if p >= 1.0:
        raise NotCovered("p = 1")
    _check(x, residual, seed)
    x_code, code = _code(x), _code(x if residual is None else residual)
    if code not in (x_code, 0):
        raise NotCovered(f"a residual of {None if residual is None else residual.dtype} for an input of {x.dtype}")
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x if residual is None else residual)
    addresses = (x.data_ptr(), 0 if residual is None else residual.data_ptr(), y.data_ptr())
    scale = 1.0 / (1.0 - p)
    _launch("dropout", x.device, x_code, code, *addresses, x.numel(), seed.data_ptr(), threshold(p), scale)
    return y


def _gated(gate: Tensor, up: Tensor | None, *options: str) -> Tensor:
    _check(gate, up)
    left, right = _halves(gate, up)
    code = _same_type(left, right)
    y = left.new_empty(left.shape)
    if y.numel() == 0:
        return y
    (left, left_stride), (right, right_stride) = _rows(left), _rows(right)
    rows, cols = _geometry(y, left_stride, right_stride)
    addresses = (left.data_ptr(), left_stride, right.data_ptr(), right_stride, y.data_ptr())
    _launch("swiglu", y.device, _kind(options), code, *addresses, rows, cols)
    return y


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor | None, *options: str) -> tuple[Tensor, Tensor]:
    _check(grad, gate, up)
    left, right = _halves(gate, up)
    code = _same_type(left, right, grad)
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0 if up is None else right.shape)
    if grad.numel() == 0:
        return dgate, dup
    grad = grad.contiguous()
    (left, left_stride), (right, right_stride) = _rows(left), _rows(right)
    out_stride, size = dgate.shape[-1], right.shape[-1]
    rows, cols = _geometry(grad, left_stride, right_stride, out_stride)
    into = dgate.data_ptr() + size * dgate.element_size() if up is None else dup.data_ptr()
    _launch(
        "swiglu_backward", grad.device, _kind(options), code, grad.data_ptr(), left.data_ptr(), left_stride, right.data_ptr(),
        right_stride, dgate.data_ptr(), into, out_stride, rows, cols,
    )  # fmt: skip
    return dgate, dup


for _name in ("swiglu", "geglu"):
    implement(_name, "cuda")(_gated)
    implement(f"{_name}_backward", "cuda")(_gated_backward)
