"""The ops: one formula each, several engines. Names and arguments are torch.nn.functional's.

    from fastgpt import ops
    y = ops.attention(q, k, v, is_causal=True)

They work under autograd, autocast and torch.compile. `backend.py` has the choice of engine; importing this registers the ops in torch's
namespace `fastgpt` and patches nothing.
"""

from fastgpt.ops import backend
from fastgpt.ops.activation import gelu, relu, sigmoid, silu, tanh
from fastgpt.ops.adamw import adamw, grad_norm
from fastgpt.ops.add_norm import add_layer_norm, add_rms_norm
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_decode import attention_decode
from fastgpt.ops.backend import get_backend, set_backend, use_backend
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.dropout import dropout, dropout_add
from fastgpt.ops.embedding import embedding
from fastgpt.ops.layer_norm import layer_norm
from fastgpt.ops.linear import linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.log_softmax import log_softmax
from fastgpt.ops.rms_norm import rms_norm
from fastgpt.ops.rope import rope, rope_tables
from fastgpt.ops.softmax import softmax
from fastgpt.ops.swiglu import geglu, swiglu
from fastgpt.ops.transformer_block import transformer_block

__all__ = [
    "adamw",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "cross_entropy",
    "dropout",
    "dropout_add",
    "embedding",
    "geglu",
    "gelu",
    "get_backend",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "relu",
    "rms_norm",
    "rope",
    "rope_tables",
    "set_backend",
    "sigmoid",
    "silu",
    "softmax",
    "swiglu",
    "tanh",
    "transformer_block",
    "use_backend",
]

backend.start()
