"""What the tests of the Triton kernels share: where they run, and how an op is held to its formula there.

With a GPU they run on it, in the test process. Without one they run in Triton's interpreter, which needs TRITON_INTERPRET=1
before triton is imported and therefore a process of its own: test_triton.py starts one for each of these files. Anywhere else the
files skip.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import parity
import pytest
import torch
from torch import Tensor

from fastgpt import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as test_triton.py sets it", allow_module_level=True)

gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="sizes for a GPU")]


def convert_as_hardware_does() -> None:
    """Let the interpreter round float32 to bfloat16 to the nearest even value, where it truncates, and widen every bfloat16 to its
    value in float32, where it loses that of the subnormal ones; no chip does either."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            wide = torch.tensor(src.data).view(torch.bfloat16).to(torch.float32).numpy()
            return TensorHandle(wide, dst_type.scalar)
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(rounded, dst_type.scalar)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_ext = lambda self, src, dst_type: self.cast_impl(src, dst_type)
    InterpreterBuilder.create_fp_trunc = lambda self, src, dst_type: self.cast_impl(src, dst_type)


if DEVICE == "cpu":
    convert_as_hardware_does()


@pytest.fixture
def triton_engine() -> Iterator[None]:
    """Every op of the test runs on this engine, forward and backward, or raises."""
    with ops.use_backend("triton"):
        yield


def there(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of CPU tensors that computes on the engine's device."""
    return lambda *leaves: function(*(leaf.to(DEVICE) for leaf in leaves)).cpu()


def opcheck(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
    """The schema and the fake implementation against what the kernels do; the op's own tests check the rest."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def check_op(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    what: str = "",
) -> None:
    """parity.check_op with our op and torch's on the engine's device, the formula in float64 on the CPU."""
    parity.check_op(there(ours), there(torchs), formula, inputs, what)
