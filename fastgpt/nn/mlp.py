"""The feed-forward half of a transformer block: project(activation(expand(x))), four times as wide inside
(arXiv:1706.03762, 3.3).

ACTIVATIONS names what can stand between the two projections: relu, sigmoid, tanh, gelu (the erf form), gelu_tanh
(GPT-2's) and silu. The gated form is nn.SwiGLU.
"""

from collections.abc import Callable

import torch

from fastgpt import ops


def _gelu_tanh(input: torch.Tensor) -> torch.Tensor:
    return ops.gelu(input, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": ops.relu,
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "gelu": ops.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": ops.silu,
}


class MLP(torch.nn.Module):
    """Two linear layers with an activation between them and dropout after them.

    Args:
        n_embd: width of the input and the output, C.
        n_hidden: width inside; 4 * n_embd where None.
        activation: a name in ACTIVATIONS.
        bias: whether both linear layers have one.
        dropout: probability for the output, in [0, 1), active in training mode only.

    Shapes: (..., C) to (..., C), in the parameters' dtype (the autocast dtype under autocast).
    state_dict keys: c_fc.weight (4C, C), c_fc.bias (4C), c_proj.weight (C, 4C), c_proj.bias (C).

    Raises:
        ValueError: an activation that does not exist.

    Example:
        >>> MLP(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        n_embd: int,
        n_hidden: int | None = None,
        *,
        activation: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
        n_hidden = 4 * n_embd if n_hidden is None else n_hidden
        self.c_fc = torch.nn.Linear(n_embd, n_hidden, bias=bias)
        self.c_proj = torch.nn.Linear(n_hidden, n_embd, bias=bias)
        self.activation = activation
        self.act = ACTIVATIONS[activation]
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_proj(self.act(self.c_fc(x)))  # (..., C) -> (..., 4C) -> (..., C)
        return ops.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
