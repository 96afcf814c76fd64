"""Rung 6, layer norm before each half and at the end: every vector has mean 0 and variance 1 where it is read."""

import torch
from setting import N_EMBD, N_LAYER, STEPS, Text, fit, options, record
from step2_one_head import Model
from step5_residual_blocks import Block

from fastgpt.nn import LayerNorm


def body() -> torch.nn.Module:
    """Three blocks and a last norm: a GPT."""
    return torch.nn.Sequential(*(Block(LayerNorm) for _ in range(N_LAYER)), LayerNorm(N_EMBD))


if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    record("layer norm", fit(text, lambda: Model(text.vocab_size, body()), steps=given.steps or STEPS), given.out)
