"""Rung 4, a layer of neurons: after looking around, each character thinks on its own, relu(W x + b)."""

import torch
from setting import N_EMBD, N_HEAD, STEPS, Text, fit, options, record
from step2_one_head import Heads, Model

from fastgpt.nn import ReLU


def body() -> torch.nn.Module:
    """Four heads, then 32 neurons."""
    return torch.nn.Sequential(Heads(N_HEAD), torch.nn.Linear(N_EMBD, N_EMBD), ReLU())


if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    record("feed-forward", fit(text, lambda: Model(text.vocab_size, body()), steps=given.steps or STEPS), given.out)
