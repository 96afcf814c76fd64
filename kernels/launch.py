"""What every Triton launcher shares: which dtypes there are, and what is known about the device.

Launchers take tensors in the ops' schemas (fastgpt/ops/reference) and trust them: the dtypes are float32, float16 or bfloat16 and all
tensors lie on one device, which is the current one. `fastgpt.ops.triton` checks that; it is the only caller in the package.

A launcher asks this module, never the device, so that `aot.py` can compile for an architecture that is not there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DTYPES", "INTERPRETED", "architecture", "dot_precision", "multiprocessors", "operand"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Set by TRITON_INTERPRET=1 before the first import of triton: kernels then run on CPU tensors in Triton's interpreter.
INTERPRETED: bool = triton.knobs.runtime.interpret

_NAMES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

assumed_architecture = 80  # for tensors without a CUDA device: the interpreter's, and aot.py's meta tensors


def architecture(x: Tensor) -> int:
    """The compute capability of a tensor's device as one number: 80, 90, 100."""
    if x.device.type != "cuda":
        return assumed_architecture
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors a tensor's device has; 10 in the interpreter, so that small tests have several programs."""
    if x.device.type != "cuda":
        return 10 if INTERPRETED else 132
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def operand(x: Tensor) -> tl.dtype:
    """The type in which `tl.dot` takes a tensor's values: its own; float32 in the interpreter, which multiplies bf16 wrongly."""
    return tl.float32 if INTERPRETED else _NAMES[x.dtype]


def dot_precision(x: Tensor) -> str:
    """`input_precision` of `tl.dot`: fp32 products are exact unless torch's own are allowed in TF32."""
    allowed = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"
