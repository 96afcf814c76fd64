"""Cross-entropy of logits with integer targets, fused with the log-softmax, and its gradient.

With a share s of label smoothing (arXiv 1512.00567, section 7), C classes and the target t of a row v:

    lse = log sum exp v;   loss = (1 - s) * (lse - v[t]) + s * (lse - sum v / C)
    dv[j] = dloss * (exp(v[j] - lse) - s / C - (1 - s) * [j = t])

A z-loss z (arXiv 2204.02311) adds z lse^2 to the loss and dloss 2 z lse exp(v[j] - lse) to the gradient.

A row whose target is `ignore_index` has loss, lse and gradient 0. A target outside the classes reads nothing and has loss and gradient
NaN: raising as the CPU does would make the CPU wait for the GPU on each call. The forward reads the logits once, with the running
maximum and sum of arXiv 1805.02867; nothing of the softmax is stored, the backward computes it again from lse. Computed in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import tuning

__all__ = ["cross_entropy", "cross_entropy_backward"]

CHOICES = tuning.candidates(BLOCK_N=(2048, 4096, 8192, 16384), num_warps=(4, 8, 16))
KEY = ("classes", "HAS_Z")  # what a measured tile is kept by


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, classes, row_stride, ignore_index, smoothing, z_loss,
    HAS_SMOOTHING: tl.constexpr, HAS_Z: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program, BLOCK_N classes a step."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    logits_ptr += row * row_stride
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sum_v = tl.full((), 0.0, tl.float32)
    for start in range(0, tl.where(counted, classes, 0), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        v = tl.load(logits_ptr + col, mask=col < classes, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(v, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all -inf so far: keep the sum 0 instead of NaN
        total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base), axis=0)
        top = new_top
        if HAS_SMOOTHING:
            sum_v += tl.sum(tl.where(col < classes, v, 0.0), axis=0)
    lse = top + tl.log(total)
    valid = counted & (target >= 0) & (target < classes)
    v_target = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    loss = (1.0 - smoothing) * (lse - v_target)
    if HAS_SMOOTHING:
        loss += smoothing * (lse - sum_v / classes)
    if HAS_Z:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    exact = top.to(tl.float64) + tl.log(total).to(tl.float64)
    tl.store(lse_ptr + row, tl.where(counted, exact, 0.0))


@triton.jit
def cross_entropy_bwd_kernel(
    grad_ptr, logits_ptr, target_ptr, lse_ptr, dlogits_ptr, classes, row_stride, grad_stride, ignore_index, smoothing, z_loss,
    HAS_Z: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N classes of one row a program; grad_stride is 0 where all rows share one gradient."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row)
    exact = tl.load(lse_ptr + row)
    lse = exact.to(tl.float32)
    rest = tl.where(
        tl.abs(lse) < float("inf"), (exact - lse.to(tl.float64)).to(tl.float32), 0.0
    )  # what fp32 leaves out
    grad = tl.load(grad_ptr + row * grad_stride).to(tl.float32)
    counted = target != ignore_index
    grad = tl.where((target >= 0) & (target < classes), grad, float("nan"))
    inside = col < classes
    v = tl.load(logits_ptr + row * row_stride + col, mask=inside & counted, other=0.0).to(tl.float32)
    wanted = smoothing / classes + tl.where(col == target, 1.0 - smoothing, 0.0)
    factor = 1.0 - rest
    if HAS_Z:
        factor *= 1.0 + 2.0 * z_loss * lse
    dlogits = tl.where(counted, grad * (tl.exp(v - lse) * factor - wanted), 0.0)
    tl.store(dlogits_ptr + row * classes + col, dlogits, mask=inside)


def _rows(logits: Tensor) -> Tensor:
    """The logits with neighbouring classes; the rows may lie apart, as in a view of a padded vocabulary."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def _tile(logits: Tensor) -> dict[str, int]:
    """A short row is one block of few warps."""
    block = min(triton.next_power_of_2(logits.shape[1]), tuning.sizes(logits).step)
    return {"BLOCK_N": block, "num_warps": max(1, min(8, block // 256))}


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The op's forward.

    Args:
        logits: (N, C) with at least one class, any strides; copied where the classes of a row are not neighbours.
        target: (N) int64.
        reduction: "mean" over the targets that are not ignored, "sum" or "none".

    Returns:
        The loss, a scalar or (N) for "none", float32, and each row's log-sum-exp (N), float64.
    """
    logits, target = _rows(logits), target.contiguous()
    rows, classes = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss, dtype=torch.float64)
    if rows:
        args = (logits, target, loss, lse, classes, logits.stride(0), ignore_index, label_smoothing, z_loss)
        flags = {"HAS_SMOOTHING": label_smoothing > 0, "HAS_Z": z_loss > 0}
        key = (*KEY, "HAS_SMOOTHING")
        tuning.launch(cross_entropy_fwd_kernel, lambda _: (rows,), args, _tile(logits), CHOICES, key, **flags)
    if reduction == "none":
        return loss, lse
    total = loss.sum()
    return (total / (target != ignore_index).sum() if reduction == "mean" else total), lse


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, reduction: str, label_smoothing: float,
    z_loss: float = 0.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits from that of the loss and the forward's lse: (N, C) in the logits' dtype, contiguous.

    `out` takes it; it may be the logits themselves where they are contiguous, of which each number is read before it is written.
    """
    logits, target = _rows(logits), target.contiguous()
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    rows, classes = logits.shape
    if rows == 0:
        return dlogits
    if reduction == "mean":
        grad = grad / (target != ignore_index).sum()
    stride = grad.stride(0) if grad.dim() else 0
    args = (
        grad,
        logits,
        target,
        lse.contiguous(),
        dlogits,
        classes,
        logits.stride(0),
        stride,
        ignore_index,
        label_smoothing,
        z_loss,
    )
    tuning.launch(
        cross_entropy_bwd_kernel, lambda tile: (rows, triton.cdiv(classes, tile["BLOCK_N"])), args, _tile(logits),
        CHOICES if out is None else (), KEY, HAS_Z=z_loss > 0,
    )  # fmt: skip
    return dlogits
