"""What the formulas share."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in the type that formulas are computed in: float32 for half types, its own otherwise."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
