"""The rotary tables of a configuration: ops.rope_tables with the scaling that a model was trained with.

linear   positions divided by factor (position interpolation, arXiv:2306.15595)
llama3   each frequency f, of wavelength w = 2 pi / f, is multiplied by

             1                          where w < L / high_freq_factor
             1 / factor                 where w > L / low_freq_factor
             (1 - s) / factor + s       between, s = (L / w - low_freq_factor) / (high_freq_factor - low_freq_factor)

         with L = original_block_size, the length of the texts before the scaling (Llama 3.1; arXiv:2407.21783, 3.4.2).
"""

import math

import torch

from fastgpt import ops
from fastgpt.model.config import GPTConfig


def rope_scale(config: GPTConfig) -> float | torch.Tensor:
    """What positions are multiplied by: a number, or a (head_dim / 2) float64 tensor of one for each frequency."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    factor = float(scaling["factor"])
    if scaling["type"] == "linear":
        return 1.0 / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    turns = scaling["original_block_size"] * config.rope_theta**-exponents / (2 * math.pi)  # L / w
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) / factor + smooth


def rope_tables(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of every position below block_size, (block_size, head_dim / 2) float32 on the CPU.

    Example:
        >>> shape = {"vocab_size": 65, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 8}
        >>> rope_tables(GPTConfig(**shape, position="rope"))[0].shape
        torch.Size([64, 2])
    """
    # Real memory even where the model itself is made without; and no inference tensors, which could not take part in training later.
    with torch.device("cpu"), torch.inference_mode(False):
        return ops.rope_tables(config.head_dim, config.block_size, config.rope_theta, scale=rope_scale(config))
