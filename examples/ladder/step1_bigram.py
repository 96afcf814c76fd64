"""Rung 1, the bigram: the next character from the present one alone, a table of 65 x 65 numbers learned by gradient descent.

Its loss cannot go below that of counting pairs. The lecture gives this rung 3000 steps at ten times the learning rate of the others.
"""

import torch
from setting import Text, fit, options, record

from fastgpt import ops


class Bigram(torch.nn.Module):
    """Row i of the table holds the logits of the character after i."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.table(x)  # (B, T, V)
        return logits, ops.cross_entropy(logits.flatten(0, 1), y.flatten())


if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    result = fit(text, lambda: Bigram(text.vocab_size), steps=given.steps or 3000, learning_rate=1e-2)
    record("bigram", result, given.out)
