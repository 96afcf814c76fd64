"""Every memory-bound op of the engine `cuda` through its wrapper, on the emulation, as tests/test_cuda_gpu.py has it on a GPU."""

import pytest
import torch
from cuda_cases import DTYPES, OPS, SIZES, arguments, call, check, moved
from torch import Tensor

from emu.build import compiler
from emu.engine import Wrappers, on_emulator

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")


@pytest.fixture(scope="module")
def emulator() -> Wrappers:
    return Wrappers()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_each_op_is_the_formula(emulator: Wrappers, op: str, dtype: torch.dtype) -> None:
    for rows, cols in SIZES.values():
        args = arguments(op, rows, cols, dtype)
        with on_emulator(emulator, guarded=False):
            ours = call(op, "cuda", moved(args, Tensor.clone))
        check(op, ours, args)
