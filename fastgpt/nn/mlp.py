"""The feed-forward half of a transformer block: project(activation(expand(x))), four times as wide inside
(arXiv:1706.03762, 3.3).

ACTIVATIONS names what can stand between the two projections: relu, sigmoid, tanh, gelu (the erf form), gelu_tanh
(GPT-2's) and silu. GATED_ACTIVATIONS names the gated forms, activation(gate) * up (arXiv:2002.05202): swiglu (Llama's),
geglu and geglu_tanh. Their first projection makes gate and up together, in one product. nn.SwiGLU has the same formula
with the gate and up projections apart.
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


def _geglu_tanh(gate: torch.Tensor) -> torch.Tensor:
    return ops.geglu(gate, approximate="tanh")


GATED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": ops.swiglu,
    "geglu": ops.geglu,
    "geglu_tanh": _geglu_tanh,
}


def hidden_width(n_embd: int, activation: str) -> int:
    """The default width inside: 4 * n_embd, or for a gated activation 8/3 * n_embd rounded up to a multiple of 64, which has about as
    many weights."""
    return -(-8 * n_embd // (3 * 64)) * 64 if activation in GATED_ACTIVATIONS else 4 * n_embd


class MLP(torch.nn.Module):
    """Two linear layers with an activation between them and dropout after them.

    Args:
        n_embd: width of the input and the output, C.
        n_hidden: width inside, F; `hidden_width` where None: 4 * n_embd, less for gated activations.
        activation: a name in ACTIVATIONS or GATED_ACTIVATIONS.
        bias: whether both linear layers have one.
        dropout: probability for the output, in [0, 1), active in training mode only.

    Shapes: (..., C) to (..., C), in the parameters' dtype (the autocast dtype under autocast).
    state_dict keys: c_fc.weight (F, C), c_fc.bias (F), c_proj.weight (C, F), c_proj.bias (C). With a gated activation c_fc has 2 F
    rows: the gate's, then those of what it gates.

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
        known = ACTIVATIONS | GATED_ACTIVATIONS
        if activation not in known:
            raise ValueError(f"activation: got {activation!r}; accepted: {', '.join(known)}")
        n_hidden = hidden_width(n_embd, activation) if n_hidden is None else n_hidden
        self.is_gated = activation in GATED_ACTIVATIONS
        self.c_fc = torch.nn.Linear(n_embd, n_hidden * (2 if self.is_gated else 1), bias=bias)
        self.c_proj = torch.nn.Linear(n_hidden, n_embd, bias=bias)
        self.activation = activation
        self.act = known[activation]
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_proj(self.act(self.c_fc(x)))  # (..., C) -> (..., F) -> (..., C)
        return ops.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"
