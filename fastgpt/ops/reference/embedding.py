"""Rows of a matrix by their numbers."""

import torch
from torch import Tensor

from fastgpt.ops.reference.common import wide


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    return weight[input_ids.long()]


def embedding_backward(grad: Tensor, input_ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    dweight = wide(grad).new_zeros(rows, grad.shape[-1])
    embedding_accumulate(dweight, wide(grad), input_ids, padding_idx)
    return dweight.to(grad.dtype)


def embedding_accumulate(into: Tensor, grad: Tensor, input_ids: Tensor, padding_idx: int) -> None:
    """Adds each position's gradient to its id's row, in place."""
    ids = input_ids.reshape(-1).long()
    rows = grad.reshape(-1, grad.shape[-1]).to(into.dtype)
    into.index_add_(0, ids, torch.where((ids != padding_idx)[:, None], rows, 0.0))
