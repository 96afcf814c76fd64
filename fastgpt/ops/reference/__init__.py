"""The formulas: every op and its gradient in plain torch, on any device and dtype.

Each engine is tested against these functions in float64. They compute in float32 for half types and in the input's own type otherwise,
and they are the last engine that takes what the others do not cover. Arguments are those of the ops' schemas, not of the public
functions: the reduced dimension is last, defaults are filled in. A module an op, by the name of the op's own.
"""

from fastgpt.ops.reference.activation import (
    KEEPS_RESULT,
    by_name,
    gelu,
    gelu_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    silu,
    silu_backward,
    tanh,
    tanh_backward,
)
from fastgpt.ops.reference.adamw import adamw, grad_norm
from fastgpt.ops.reference.add_norm import add_layer_norm, add_layer_norm_backward, add_rms_norm, add_rms_norm_backward
from fastgpt.ops.reference.attention import attention, attention_backward, attention_decode, visible
from fastgpt.ops.reference.bias_activation import bias_activation, bias_activation_backward
from fastgpt.ops.reference.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_inplace
from fastgpt.ops.reference.dropout import dropout, dropout_mask, philox
from fastgpt.ops.reference.embedding import embedding, embedding_accumulate, embedding_backward
from fastgpt.ops.reference.layer_norm import layer_norm, layer_norm_backward
from fastgpt.ops.reference.linear import linear, linear_backward
from fastgpt.ops.reference.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.reference.log_softmax import log_softmax, log_softmax_backward
from fastgpt.ops.reference.rms_norm import rms_norm, rms_norm_backward
from fastgpt.ops.reference.rope import rope
from fastgpt.ops.reference.softmax import causal_mask, softmax, softmax_backward
from fastgpt.ops.reference.swiglu import geglu, geglu_backward, swiglu, swiglu_backward
from fastgpt.ops.reference.transformer_block import transformer_block, transformer_block_backward

__all__ = [
    "KEEPS_RESULT",
    "adamw",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "attention_decode",
    "bias_activation",
    "bias_activation_backward",
    "by_name",
    "causal_mask",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_inplace",
    "dropout",
    "dropout_mask",
    "embedding",
    "embedding_accumulate",
    "embedding_backward",
    "geglu",
    "geglu_backward",
    "gelu",
    "gelu_backward",
    "grad_norm",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "log_softmax",
    "log_softmax_backward",
    "philox",
    "relu",
    "relu_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "sigmoid",
    "sigmoid_backward",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "swiglu",
    "swiglu_backward",
    "tanh",
    "tanh_backward",
    "transformer_block",
    "transformer_block_backward",
    "visible",
]
