"""Masks that say no more than "causal".

transformers 4.5x makes one wherever there is no cache and no attention_mask (a training step under gradient checkpointing or with
use_cache=False), in case several texts were packed into one row.

A layer that gets such a mask is computed as one without a mask. That is looked up once a mask, in its numbers; all layers of a step get
the same tensor.
"""

import torch
from torch import Tensor

_SEEN = "_fastgpt_causal"  # an attribute of the mask: its version, and whether it is causal only


def is_causal_only(mask: Tensor | None, queries: int) -> bool:
    """Whether a mask (B, H, Tq, Tk), True where a key is seen, lets every query see all keys up to its own and no others.

    False for masks of other types, sizes or devices than the CPU (where to look would be to wait), and under torch.compile.

    Example:
        >>> is_causal_only(torch.ones(2, 1, 3, 3, dtype=torch.bool).tril(), 3)
        True
    """
    if (
        mask is None
        or torch.compiler.is_compiling()
        or mask.dtype != torch.bool
        or mask.device.type != "cpu"
        or mask.dim() != 4
        or mask.shape[-2:] != (queries, queries)
    ):
        return False
    version, causal = getattr(mask, _SEEN, (None, False))
    if version != mask._version:
        causal = bool((mask == torch.ones(queries, queries, dtype=torch.bool).tril()).all())
        setattr(mask, _SEEN, (mask._version, causal))
    return causal
