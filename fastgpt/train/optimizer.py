"""AdamW with decoupled weight decay on matrices only.

Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101, algorithm 2. Parameters with two or more dimensions
(linear weights, embeddings) decay; biases and the gains of layer norms do not, because shrinking them changes what the network
computes without restraining it. The update itself is torch.optim.AdamW's fused one: a single pass over each tensor.
"""

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters in two groups, with and without decay.

    A parameter used in two places (a tied head) appears once. Two kinds of state follow each parameter: `exp_avg` and `exp_avg_sq`.

    Args:
        model: the network; parameters with `requires_grad` False are left alone.
        learning_rate: rate of the first step; the training loop sets each step's own.
        weight_decay: coefficient for parameters of two or more dimensions.
        betas: decays of the first and second moment.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
