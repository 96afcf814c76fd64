"""Attention with a sliding window, packed sequences or dropout, forward and backward, against torch with the same mask.

The baseline is torch's scaled_dot_product_attention with an additive mask (windows, packed sequences), or its plain formula with the
weights multiplied by our mask (dropout: torch's own draws other numbers). FLOPs count the pairs that the mask leaves.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference

from ..variants import Variant
from .kit import Case, Kit, Made, both

SEED = 7


def attention_with(option: str, batch: int, heads: int, time: int, dim: int, dtype: str) -> Case:
    """Causal attention with `option`: "window" (a quarter of the sequence), "packed" (sequences of 1, 2, 3 and 4 parts of ten) or
    "dropout" (0.1)."""
    lengths = [time * part // 10 for part in (1, 2, 3)]
    offsets = torch.tensor([0, *lengths, time - sum(lengths)]).cumsum(0).int()
    left = time // 4 if option == "window" else -1
    cu = offsets if option == "packed" else None
    seen = reference.visible(time, time, True, left, -1, cu, cu, torch.device("cpu"))

    def make(kit: Kit) -> Made:
        qkv = kit.normal(batch, time, 3 * heads, dim, dtype=dtype)
        leaves = tuple(part.transpose(1, 2) for part in qkv.chunk(3, dim=2))
        grad = kit.normal(batch, time, heads, dim, dtype=dtype).transpose(1, 2)
        mask, places = seen.to(kit.device), offsets.to(kit.device)
        seed = torch.tensor(SEED, device=kit.device)
        choices: dict[str, dict[str, Any]] = {
            "window": {"window": (left, -1)},
            "packed": {"cu_seqlens": (places, places), "max_seqlens": (int(offsets.diff().max()),) * 2},
            "dropout": {"dropout_p": 0.1, "seed": seed},
        }
        more = choices[option]
        kept = None
        if option == "dropout":
            kept = reference.dropout_mask((batch, heads, time, time), seed, 0.1).to(qkv.dtype) / 0.9

        def in_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if kept is None:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            scores = (q @ k.mT / math.sqrt(dim)).masked_fill(~mask, -math.inf)
            return (torch.softmax(scores, -1) * kept) @ v

        bind = both(leaves, grad)
        variants = kit.ours(bind(lambda *x: ops.attention(*x, is_causal=True, **more)), chips=True)
        variants.append(Variant("torch, same mask", bind(in_torch)))

        def picked(found: Any) -> tuple[Tensor, ...]:
            return tuple(x if option == "dropout" else x[-1:, -1:] for x in found)  # a head has its own mask of dropout

        def expected() -> tuple[Tensor, ...]:
            q, k, v, g = (x.double() for x in picked((*leaves, grad)))
            drops = (0.1, seed) if option == "dropout" else (0.0, None)
            packed = (0.0, places, places) if option == "packed" else ()
            options = (True, 1 / math.sqrt(dim), *drops, left, -1, *packed)
            out, lse = reference.attention(q, k, v, *options)
            return reference.attention_backward(g, q, k, v, out, lse, *options)

        return Made(variants, expected, picked)

    flops = 14 * batch * heads * int(seen.sum()) * dim
    return Case("attention", f"forward and backward, {option}", dtype, (batch, heads, time, dim), make, flops=flops)
