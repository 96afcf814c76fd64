"""Loads the C++ SIMD engine and holds what its callers share.

torch is imported first on purpose: both link libgomp.so.1, and the module that comes second is given the first one's copy, so there is
one pool of threads and `torch.set_num_threads` rules both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import fastgpt._cpu as kernels
from fastgpt.ops.backend import NotCovered

__all__ = ["address", "dtype_code", "empty", "kernels", "threads"]

_CODES = {torch.float32: 0, torch.bfloat16: 1}

kernels.isa()  # fails here, when the engine is loaded, where FASTGPT_CPU_ISA names what is not there

threads = torch.get_num_threads


def dtype_code(x: Tensor) -> int:
    """The engine's number for a tensor's dtype; raises NotCovered for one it does not compute in."""
    code = _CODES.get(x.dtype)
    if code is None:
        raise NotCovered(f"dtype {x.dtype}; covered are float32 and bfloat16")
    return code


def address(x: Tensor | None) -> int:
    """A tensor's memory, 0 for None."""
    return 0 if x is None else x.data_ptr()


_LARGE_BYTES = 32 << 20  # from here on the C library maps fresh memory at every allocation


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor; a large one on pages of 2 MB where the system has them.

    Mapping 4 KB pages one by one costs more than most kernels: 823 MB are mapped, filled and freed in 280 ms, with large pages in 58
    (two cores of a Zen 4 EPYC).
    """
    result = torch.empty(shape, dtype=dtype)
    if result.nbytes >= _LARGE_BYTES:
        kernels.advise_huge_pages(result.data_ptr(), result.nbytes)
    return result
