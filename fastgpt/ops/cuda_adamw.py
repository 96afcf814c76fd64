"""The engine `cuda`: AdamW over all parameters in one launch, and the norm of all gradients, by csrc/cuda/adamw.cuh.

The kernels read lists of addresses on the device. A list is made once and kept, so that later steps with the same tensors copy nothing
and CUDA graphs can hold a step; a graph's step has the step number and the learning rate that it was captured with.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.ops import cuda
from fastgpt.ops.backend import NotCovered, implement
from fastgpt.ops.graphs import hold

CHUNK = 4096  # elements a block; kChunk in csrc/cuda/kernels.cuh


@functools.lru_cache(maxsize=64)
def _table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list of numbers on the device, kept for the next call with the same ones, and for good where a CUDA graph reads it."""
    table = _table(numbers, dtype, device)
    hold(table)
    return table


def _list(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Each tensor's first chunk (and the end), its size, how many tensors and how many chunks there are."""
    sizes, first = [x.numel() for x in tensors], [0]
    for size in sizes:
        first.append(first[-1] + -(-size // CHUNK))
    starts = _on_device(tuple(first), torch.int64, device)
    return starts, _on_device(tuple(sizes), torch.int64, device), len(tensors), first[-1]


def _addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return _on_device(tuple(x.data_ptr() for x in tensors), torch.int64, device)


def _covered(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> int:
    """The type code that the tensors share."""
    for x in tensors:
        if x.dtype not in dtypes or x.dtype != tensors[0].dtype:
            raise NotCovered(f"dtype {x.dtype}; covered are {', '.join(map(str, dtypes))}, one for all")
        if not x.is_contiguous():
            raise NotCovered("tensors that are not contiguous")
    return cuda._code(tensors[0])


@implement("grad_norm", "cuda")
def _grad_norm(grads: list[Tensor]) -> Tensor:
    cuda._check(*grads)
    code = _covered(grads, list(cuda._CODES))
    device = grads[0].device
    geometry = _list(grads, device)
    parts = torch.empty(max(1, geometry[-1]), dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float64, device=device)
    cuda._launch("grad_norm", device, code, *geometry, _addresses(grads, device), parts, norm)
    return norm.cpu()


@implement("adamw", "cuda")
def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    weight_decays: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float,
    step: int,
    shadows: list[Tensor],
    zero_grads: bool,
) -> None:
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    cuda._check(*params, *grads, *exp_avgs, *exp_avg_sqs, *shadows)
    for tensors in lists:
        _covered(tensors, (torch.float32,))
    shadow_code = _covered(shadows, (torch.bfloat16, torch.float16)) if shadows else cuda._CODES[torch.bfloat16]
    device = params[0].device
    decays = _on_device(tuple(1.0 - lr * decay for decay in weight_decays), torch.float32, device)
    cuda._launch(
        "adamw", device, shadow_code, *_list(params, device), *(_addresses(tensors, device) for tensors in lists),
        _addresses(shadows, device) if shadows else None, decays, beta1, beta2, eps, grad_scale, lr / (1.0 - beta1**step),
        math.sqrt(1.0 - beta2**step), zero_grads,
    )  # fmt: skip
