"""Modules on the ops: torch.nn's names, arguments and state_dict keys, plus the two blocks of a transformer.

    from fastgpt import nn

    norm = nn.LayerNorm(768)                      # a torch.nn.LayerNorm, computed by fastgpt.ops.layer_norm
    attention = nn.CausalSelfAttention(768, 12)   # (B, T, C) -> (B, T, C)

Importing this package changes nothing in torch.
"""

from fastgpt.nn.attention import CausalSelfAttention, LayerCache
from fastgpt.nn.encoder import MultiheadAttention, TransformerEncoderLayer
from fastgpt.nn.linear import Linear, LinearCrossEntropyLoss
from fastgpt.nn.mlp import ACTIVATIONS, GATED_ACTIVATIONS, MLP
from fastgpt.nn.modules import (
    GELU,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    LogSoftmax,
    ReLU,
    RMSNorm,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from fastgpt.nn.swiglu import SwiGLU

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "GELU",
    "MLP",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SwiGLU",
    "Tanh",
    "TransformerEncoderLayer",
]
