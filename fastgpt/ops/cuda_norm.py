"""The engine `cuda`: LayerNorm and RMSNorm, with a residual or without, by csrc/cuda/norm.cuh.

The parameters' gradients are summed by a fixed number of blocks and then over the blocks in a fixed order, so they are the same bits in
every run and on every GPU.
"""

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.backend import NotCovered, implement

PARTS = 264  # blocks among which the rows of a backward are spread: two for each multiprocessor of an H100


def _param_code(code: int, *params: Tensor | None) -> int:
    """The parameters' type: the rows' or float32."""
    codes = {cuda._code(p) for p in params if p is not None} or {code}
    if len(codes) > 1 or not codes <= {code, 0}:
        raise NotCovered(f"parameters of {[p.dtype for p in params if p is not None]}")
    return codes.pop()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, *, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, what was normalised (x or the sum), mean (empty for RMSNorm) and rstd."""
    cuda._check(x, residual, weight, bias)
    if residual is not None and residual.dtype != x.dtype and x.dtype == torch.float32:
        x, residual = residual, x  # the kernel takes a half-type x with an fp32 residual
    x_code, code = cuda._code(x), cuda._code(x if residual is None else residual)
    if code not in (x_code, 0):
        raise NotCovered(f"a residual of {None if residual is None else residual.dtype} for an input of {x.dtype}")
    param_code = _param_code(code, weight, bias)
    x, residual, weight, bias = x.contiguous(), _contiguous(residual), _contiguous(weight), _contiguous(bias)
    y = torch.empty_like(x if residual is None else residual)
    summed = x if residual is None else torch.empty_like(residual)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    cuda._launch(
        "norm", x.device, x_code, code, param_code, x, residual, weight, bias, None if residual is None else summed, y,
        None if rms else mean, rstd, rstd.numel(), x.shape[-1], eps,
    )  # fmt: skip
    return y, summed, mean, rstd


def _norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    needs_params: bool,
    needs_half: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dx in bf16 (empty unless asked for), dweight and dbias; no mean: RMSNorm."""
    cuda._check(grad, grad_sum, s, weight, mean, rstd)
    code = cuda._same_type(*(x for x in (grad, grad_sum, s) if x is not None))
    param_code = _param_code(code, weight)
    grad, s, grad_sum, weight = grad.contiguous(), s.contiguous(), _contiguous(grad_sum), _contiguous(weight)
    rows, cols = rstd.numel(), s.shape[-1]
    dx = torch.empty_like(s)
    half = s.new_empty(s.shape if needs_half else 0, dtype=torch.bfloat16)
    dweight = s.new_empty(cols if needs_params else 0, dtype=s.dtype if weight is None else weight.dtype)
    dbias = torch.empty_like(dweight)
    if s.numel() == 0:
        return dx, half, dweight.zero_(), dbias.zero_()
    count = min(rows, PARTS)
    matrices = 1 if mean is None else 2
    parts = s.new_empty((count, matrices, cols), dtype=torch.float32) if needs_params else None
    cuda._launch(
        "norm_backward", s.device, code, param_code, grad, grad_sum, s, weight, mean, rstd, dx, half if needs_half else None,
        dweight if needs_params else None, dbias if needs_params and mean is not None else None, parts, count, rows, cols,
    )  # fmt: skip
    return dx, half, dweight, dbias


@implement("layer_norm", "cuda")
def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _norm(x, None, weight, bias, eps, rms=False)
    return y, mean, rstd


@implement("layer_norm_backward", "cuda")
def _layer_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_params: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, dweight, dbias = _norm_backward(grad, None, x, weight, mean, rstd, needs_params)
    return dx, dweight, dbias


@implement("rms_norm", "cuda")
def _rms(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = _norm(x, None, weight, None, eps, rms=True)
    return y, rstd


@implement("rms_norm_backward", "cuda")
def _rms_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dx, _, dweight, _ = _norm_backward(grad, None, x, weight, None, rstd, needs_weight)
    return dx, dweight


@implement("add_layer_norm", "cuda")
def _add_layer(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm(x, residual, weight, bias, eps, rms=False)


implement("add_layer_norm_backward", "cuda")(_norm_backward)


@implement("add_rms_norm", "cuda")
def _add_rms(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, summed, _, rstd = _norm(x, residual, weight, None, eps, rms=True)
    return y, summed, rstd


@implement("add_rms_norm_backward", "cuda")
def _add_rms_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    needs_weight: bool,
    needs_half: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(grad, grad_sum, summed, weight, None, rstd, needs_weight, needs_half)[:3]
