"""Rung 5, three blocks with residual paths: x + f(x), so that the gradient reaches the first block undiminished."""

import torch
from setting import N_EMBD, N_HEAD, N_LAYER, STEPS, Text, fit, options, record
from step2_one_head import Heads, Model

from fastgpt.nn import ReLU


class Block(torch.nn.Module):
    """Attention with its projection, then the neurons (four times as many as the width), each added to the path.

    Args:
        norm: makes what stands before each half.
    """

    def __init__(self, norm: type[torch.nn.Module] = torch.nn.Identity) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm(N_EMBD), norm(N_EMBD)
        self.attention = torch.nn.Sequential(Heads(N_HEAD), torch.nn.Linear(N_EMBD, N_EMBD))
        wide = 4 * N_EMBD
        self.neurons = torch.nn.Sequential(torch.nn.Linear(N_EMBD, wide), ReLU(), torch.nn.Linear(wide, N_EMBD))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.neurons(self.norm_2(x))


if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    result = fit(
        text,
        lambda: Model(text.vocab_size, torch.nn.Sequential(*(Block() for _ in range(N_LAYER)))),
        steps=given.steps or STEPS,
    )
    record("residual blocks", result, given.out)
