"""Attention on the emulator held to the one tolerance rule: at most twice torch's own error, against the formula in float64."""

import math
from dataclasses import dataclass

import torch
from parity import assert_parity, random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emu.emulator import MODES, Emulator
from fastgpt.ops import reference

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Case:
    """Sizes of a call; heads lie between rows, (B, T, H, D) in memory."""

    queries: int
    keys: int
    dim: int = 64
    causal: bool = False
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    magnitude: float = 1.0
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[tuple[int, int], ...] = ()  # of packed sequences: queries and keys of each, queries and keys in all
    dropout: float = 0.0

    def tensor(self, heads: int, length: int, seed: int) -> Tensor:
        return random(self.batch, length, heads, self.dim, dtype=self.dtype, seed=seed, scale=self.magnitude)

    @property
    def offsets(self) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens of queries and of keys, (S + 1) int32."""
        if not self.lengths:
            return None, None
        sums = torch.tensor([(0, 0), *self.lengths]).cumsum(0).int()
        return sums[:, 0].contiguous(), sums[:, 1].contiguous()

    @property
    def seed(self) -> Tensor | None:
        """Of the dropout, beyond 32 bits."""
        return torch.tensor(-(1 << 40) - 77) if self.dropout else None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dim)


def _torch(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """torch's own result for (B, H, T, D), 0 for queries that see nothing."""
    mask = reference.visible(case.queries, case.keys, case.causal, *case.window, *case.offsets, q.device)
    if case.dropout:
        keys, values = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
        p = torch.softmax((q @ keys.mT * case.scale).masked_fill(~mask, -math.inf), -1)
        kept = reference.dropout_mask(p.shape, case.seed, case.dropout) / (1 - case.dropout)
        out = (p * kept.to(p.dtype)) @ values
        return torch.where(mask.any(-1)[:, None], out, 0.0)
    out = scaled_dot_product_attention(q, k, v, attn_mask=None if mask.all() else mask, enable_gqa=True)
    return torch.where(mask.any(-1)[:, None], out, 0.0)


def check(
    emulator: Emulator,
    case: Case,
    mode: tuple[str, str] = MODES[0],
    seed: int = 0,
    bug: str | None = None,
    backward: bool = True,
    sanitizer: str | None = None,
    more: tuple[Tensor | int | float | None, ...] = (),
    more_backward: tuple[Tensor, ...] = (),
) -> list[Tensor]:
    """Run forward and backward, hold out, lse and the three gradients to the rule, and return them.

    `more` are arguments of both bindings after the others, `more_backward` of the second after those.
    """
    c, name = case, NAMES[case.dtype]
    q, grad = c.tensor(c.heads, c.queries, 1), c.tensor(c.heads, c.queries, 4)
    k, v = c.tensor(c.kv_heads, c.keys, 2), c.tensor(c.kv_heads, c.keys, 3)
    poison = float("nan")
    out, lse = torch.full_like(q, poison), torch.full((c.batch, c.heads, c.queries), poison)
    sizes = (c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.dim, int(c.causal), float(c.scale))

    def call(kernel: str, *arguments: Tensor | int | float | None) -> None:
        if sanitizer is None:
            emulator(f"{kernel}_{name}", *arguments, mode=mode, seed=seed, bug=bug)
        else:
            emulator.sanitized(sanitizer, f"{kernel}_{name}", *arguments, mode=mode, seed=seed, bug=bug)

    call("attention_fwd", q, k, v, out, lse, *sizes, *more)
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    options = (c.causal, c.scale, c.dropout, c.seed, *c.window, 0.0, *c.offsets)
    exact, exact_lse = reference.attention(wide_q, wide_k, wide_v, *options)
    narrow = q1, k1, v1 = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    theirs = _torch(q1, k1, v1, c)
    assert_parity(out.transpose(1, 2), theirs, exact, "out")
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen), "lse is -inf elsewhere than where a query sees no key"
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)
    if not backward:
        return [out, lse]

    results = [torch.full_like(x, poison) for x in (q, k, v)]
    call(
        "attention_bwd", q, k, v, out, lse, *sizes, grad, *results, torch.full_like(lse, poison), *more, *more_backward
    )
    exact_grads = reference.attention_backward(
        grad.double().transpose(1, 2), wide_q, wide_k, wide_v, exact, exact_lse, *options
    )
    torch_grads = torch.autograd.grad(theirs, narrow, grad.transpose(1, 2))
    for what, mine, torchs, right in zip("qkv", results, torch_grads, exact_grads, strict=True):
        assert_parity(mine.transpose(1, 2), torchs, right, f"gradient of {what}")
    return [out, lse, *results]
