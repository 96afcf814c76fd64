"""Rung 2, one head of attention: each character looks at those before it and takes a weighted sum of what they offer."""

import torch
from setting import BLOCK_SIZE, N_EMBD, STEPS, Text, fit, options, record

from fastgpt import ops


class Heads(torch.nn.Module):
    """Causal self-attention without a projection behind it: n_head heads side by side."""

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = torch.nn.Linear(N_EMBD, 3 * N_EMBD, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        return ops.attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)


class Model(torch.nn.Module):
    """Characters and positions as vectors, then `body`, then a linear layer to the logits.

    Args:
        vocab_size: number of characters.
        body: (B, T, C) to (B, T, C).
    """

    def __init__(self, vocab_size: int, body: torch.nn.Module) -> None:
        super().__init__()
        self.characters = torch.nn.Embedding(vocab_size, N_EMBD)
        self.positions = torch.nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.body = body
        self.head = torch.nn.Linear(N_EMBD, vocab_size)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(self.characters(x) + self.positions.weight)  # (B, T, C)
        logits = self.head(h)  # (B, T, V)
        return logits, ops.cross_entropy(logits.flatten(0, 1), y.flatten())


if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    record("one head", fit(text, lambda: Model(text.vocab_size, Heads(1)), steps=given.steps or STEPS), given.out)
