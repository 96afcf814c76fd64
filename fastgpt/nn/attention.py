"""Causal self-attention: softmax(q k^T / sqrt(D)) v over the past, several heads side by side (arXiv:1706.03762, 3.2).

Heads may share keys and values (grouped-query attention, arXiv:2305.13245): with n_kv_head < n_head, query head h reads
the keys and values of head h // (n_head / n_kv_head). One projection makes queries, keys and values together;
`ops.attention` never stores the T x T matrix. Positions may be rotary (`rope` of forward, arXiv:2104.09864): queries and keys
turn before the keys are cached.

Sequences of several lengths may stand one after the other in one row (`lengths` of forward): each attends to itself only, and nothing
is computed for padding.

Dropout acts on the layer's output only: none of the attention probabilities are dropped here, which `ops.attention` could do.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from fastgpt import ops


class LayerCache(Protocol):
    """What attention needs of one layer's cache of keys and values; fastgpt.infer.KVCache supplies it."""

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds (B, H_kv, T_new, D) to the end and returns all keys and values so far, each (B, H_kv, T_all, D)."""
        ...


class CausalSelfAttention(torch.nn.Module):
    """Causal self-attention with grouped heads and an optional cache of keys and values.

    Args:
        n_embd: width C of the input and the output; the head's width is D = n_embd / n_head.
        n_head: query heads.
        n_kv_head: heads of keys and values, a divisor of n_head; n_head where None.
        bias: whether both linear layers have one.
        qkv_bias: whether the projection to queries, keys and values has one; as `bias` where None (Qwen2 has only this one).
        dropout: probability for the output, in [0, 1), active in training mode only.

    Shapes: (B, T, C) to (B, T, C), in the parameters' dtype (the autocast dtype under autocast). Without a cache
    position t sees positions 0..t; with one, the T new positions also see everything cached before them (the mask is
    aligned bottom right):

        cached 2, new 2:    k0 k1 k2 k3
                        q2   x  x  x
                        q3   x  x  x  x

    With `lengths`, which sum to T, x is (1, T, C) and holds that many sequences one after the other; there is no cache then.

    Where positions are rotary, forward takes `rope`: (cos, sin) of the T new ones as `ops.rope_tables` makes them, (T, D / 2) each.

    state_dict keys: c_attn.weight ((H + 2 H_kv) D, C), rows in the order queries, keys, values; c_attn.bias;
    c_proj.weight (C, C); c_proj.bias. With n_kv_head = n_head that is GPT-2's and nanoGPT's layout.

    Raises:
        ValueError: n_embd is no multiple of n_head, or n_head none of n_kv_head.

    Example:
        >>> CausalSelfAttention(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        *,
        n_kv_head: int | None = None,
        bias: bool = True,
        qkv_bias: bool | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head < 1 or n_embd % n_head:
            raise ValueError(f"n_head: got {n_head}; n_embd = {n_embd} must be a multiple of it")
        if n_kv_head < 1 or n_head % n_kv_head:
            raise ValueError(f"n_kv_head: got {n_kv_head}; n_head = {n_head} must be a multiple of it")
        self.head_dim = n_embd // n_head
        self.heads = (n_head, n_kv_head, n_kv_head)
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.c_attn = torch.nn.Linear(n_embd, sum(self.heads) * self.head_dim, bias=qkv_bias)
        self.c_proj = torch.nn.Linear(n_embd, n_embd, bias=bias)
        self.dropout = dropout

    def forward(
        self,
        x: torch.Tensor,
        cache: LayerCache | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        B, T, C = x.shape
        # One split of the heads' dimension: its backward is a single concatenation, where three slices would each fill
        # a tensor of the projection's size with zeros.
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 H_kv, D)
        if rope is None:
            q, k, v = (
                part.transpose(1, 2) for part in qkv.split(self.heads, dim=2)
            )  # (B, H, T, D), (B, H_kv, T, D) twice
        else:
            turning, v = (part.transpose(1, 2) for part in qkv.split((self.heads[0] + self.heads[1], self.heads[2]), 2))
            q, k = ops.rope(turning, *rope).split(self.heads[:2], dim=1)  # one pass over both
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H_kv, T_all, D)
        if lengths is None:
            y = ops.attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            parts = zip(*(part.split(list(lengths), dim=2) for part in (q, k, v)), strict=True)
            y = torch.cat([ops.attention(*part, is_causal=True) for part in parts], dim=2)  # (1, H, T, D)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return ops.dropout(y, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"n_head={self.heads[0]}, n_kv_head={self.heads[1]}, head_dim={self.head_dim}, dropout={self.dropout}"
