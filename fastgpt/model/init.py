"""Starting weights: the schemes gpt2, normal, zeros, xavier and he.

All of them set biases to 0 and the norms' weights to 1; they differ in the matrices (the embeddings included):

    gpt2    normal, standard deviation 0.02; 0.02 / sqrt(2 n_layer) for the two projections of every block into the
            residual stream, so that the stream's variance does not grow with depth (Radford et al., 2019, 2.3). The
            default.
    normal  normal, standard deviation 0.02 for every matrix (GPT-1, Radford et al., 2018, 4.1).
    xavier  normal, variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010, eq. 12): the variance of activations and
            gradients is kept as well as one number can through linear layers.
    he      normal, variance 2 / fan_in (arXiv:1502.01852, eq. 10): the variance of activations is kept through layers
            followed by a ReLU. The head is the token embedding, of fan-in n_embd, so that the first logits are large.
    zeros   every matrix 0. Nothing trains: the logits are 0, and so is every gradient, because each is a product with a
            matrix or an activation that is 0. The loss stays at ln(vocab_size). It is here to show why weights start at
            random.

docs/model.md has what each does to the activations and gradients of a real model and to its loss. Weights come from
torch's default generator.
"""

import math
from typing import TYPE_CHECKING

import torch

from fastgpt.errors import UserError

if TYPE_CHECKING:
    from fastgpt.model.gpt import GPT

INIT_SCHEMES = ("gpt2", "normal", "zeros", "xavier", "he")
STD = 0.02  # of gpt2 and normal


def matrix_std(scheme: str, fan_out: int, fan_in: int, *, residual: bool, n_layer: int) -> float:
    """The standard deviation that a scheme gives a (fan_out, fan_in) matrix.

    Args:
        scheme: one of INIT_SCHEMES.
        fan_out: rows of the matrix.
        fan_in: columns of the matrix.
        residual: whether its product is added to the residual stream.
        n_layer: blocks in the model.

    Raises:
        UserError: a scheme that does not exist.

    Example:
        >>> matrix_std("gpt2", 128, 512, residual=True, n_layer=8)
        0.005
    """
    if scheme == "gpt2":
        return STD / math.sqrt(2 * n_layer) if residual else STD
    if scheme == "normal":
        return STD
    if scheme == "zeros":
        return 0.0
    if scheme == "xavier":
        return math.sqrt(2 / (fan_in + fan_out))
    if scheme == "he":
        return math.sqrt(2 / fan_in)
    raise UserError(f"init: got {scheme!r}; accepted: {', '.join(INIT_SCHEMES)}")


@torch.no_grad()
def init_weights(model: "GPT", scheme: str) -> None:
    """Draws all weights of a GPT anew, in place.

    Args:
        model: the model; its weights may be anything, uninitialised memory included.
        scheme: one of INIT_SCHEMES.

    Raises:
        UserError: a scheme that does not exist; nothing is changed.
    """
    matrix_std(scheme, 1, 1, residual=False, n_layer=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_norm_weight = name.endswith("weight")  # the only vectors called so
            torch.nn.init.constant_(parameter, float(is_norm_weight))
            continue
        residual = name.endswith("c_proj.weight")
        std = matrix_std(scheme, *parameter.shape, residual=residual, n_layer=model.config.n_layer)
        torch.nn.init.normal_(parameter, std=std) if std else torch.nn.init.zeros_(parameter)
