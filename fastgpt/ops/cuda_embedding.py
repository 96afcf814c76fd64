"""The engine `cuda`: embedding and rotary embedding, by csrc/cuda/embedding.cuh and rope.cuh.

The embedding's backward sorts the numbers with torch (stable, on the device) and sums each row's gradients in the order of their
positions, so it is the same bits in every run. A number outside the matrix gives a row of NaN and no gradient.
"""

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.backend import NotCovered, implement
from fastgpt.ops.rope import _empty


@implement("embedding", "cuda")
def _embedding(input_ids: Tensor, weight: Tensor, padding_idx: int, accumulate_grad: bool) -> Tensor:
    cuda._check(input_ids, weight)
    code = cuda._code(weight)
    ids, weight = input_ids.long().contiguous(), weight.contiguous()
    rows, cols = weight.shape
    y = weight.new_empty((*ids.shape, cols))
    cuda._launch("embedding", weight.device, code, ids, weight, y, ids.numel(), rows, cols)
    return y


def _accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int, keep: bool) -> None:
    """Adds the gradient's rows into a contiguous matrix, or writes the rows that occur."""
    cuda._check(into, grad, input_ids)
    grad_code, code = cuda._code(grad), cuda._code(into)
    if code not in (grad_code, 0):
        raise NotCovered(f"a gradient of {grad.dtype} into {into.dtype}")
    if not into.is_contiguous():
        raise NotCovered("a gradient that is not contiguous")
    rows, cols = into.shape
    if input_ids.numel() >= 2**31:
        raise NotCovered("2^31 ids and more")
    ids, positions = torch.sort(input_ids.reshape(-1).long(), stable=True)
    arguments = (ids, positions, grad.contiguous(), into, ids.numel(), rows, cols, padding_idx, keep)
    cuda._launch("embedding_backward", into.device, grad_code, code, *arguments)


@implement("embedding_backward", "cuda")
def _embedding_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    dweight = grad.new_zeros((rows, grad.shape[-1]))
    _accumulate(dweight, grad, input_ids, padding_idx, False)
    return dweight


@implement("embedding_accumulate_backward", "cuda")
def _embedding_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int) -> None:
    _accumulate(into, grad, input_ids, padding_idx, True)


@implement("rope", "cuda")
def _rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    cuda._check(x, cos, sin)
    code = cuda._code(x)
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = _empty(x)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    B, H, T, D = x.shape
    cuda._launch(
        "rope",
        x.device,
        code,
        x,
        y,
        cos,
        sin,
        *x.stride()[:3],
        *y.stride()[:3],
        B,
        H,
        T,
        D,
        cos.shape[-1],
        interleaved,
        inverse,
    )
    return y
