"""What a CUDA graph needs of the engines: that the small tables which its kernels read at every replay stay where they are."""

import torch
from torch import Tensor

__all__ = ["hold"]

_held: list[Tensor] = []


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def hold(*tables: Tensor) -> None:
    """Keep tables for the rest of the process where a CUDA graph is being captured: the graph knows their addresses and does not own
    their memory, and a cache that drops its oldest tables would free it. A capture with new tables adds some kilobytes."""
    if tables and _capturing(tables[0].device):
        _held.extend(tables)
