"""The gated feed-forward layer of Llama and its kin: down_proj(silu(gate_proj(x)) * up_proj(x)) (arXiv 2002.05202, equation 6)."""

import torch

from fastgpt import ops


class SwiGLU(torch.nn.Module):
    """Three linear layers around `ops.swiglu`.

    The layers are called gate_proj, up_proj and down_proj, as in the Llama, Mistral and Qwen checkpoints of Hugging Face, so that those
    load by name, and because w1, w3 and w2 (Meta's names for them) do not say which is the gate.

    Args:
        n_embd: width of the input and the output, C.
        n_hidden: width inside; where None 8/3 C rounded up to a multiple of 64, as many parameters as an MLP of 4 C.
        bias: whether the linear layers have one; Llama's have none.

    Shapes: (..., C) to (..., C), in the parameters' dtype (the autocast dtype under autocast).
    state_dict keys: gate_proj.weight (n_hidden, C), up_proj.weight (n_hidden, C), down_proj.weight (C, n_hidden), and .bias.

    Example:
        >>> SwiGLU(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, n_embd: int, n_hidden: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        n_hidden = -(-8 * n_embd // (3 * 64)) * 64 if n_hidden is None else n_hidden
        self.gate_proj = torch.nn.Linear(n_embd, n_hidden, bias=bias)
        self.up_proj = torch.nn.Linear(n_embd, n_hidden, bias=bias)
        self.down_proj = torch.nn.Linear(n_hidden, n_embd, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))  # (..., C) -> (..., n_hidden) -> (..., C)
