"""Muon: momentum whose matrices are made orthogonal before they are applied.

    M_t = mu M_{t-1} + (1 - mu) G_t                  momentum
    O_t = orthogonal((1 - mu) G_t + mu M_t)          Nesterov's look ahead, then the nearest matrix with equal singular values
    W_t = (1 - lr wd) W_{t-1} - lr sqrt(max(1, rows / columns)) O_t

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024); weight decay as in
arXiv 2502.16982. A gradient's few large directions no longer drown the many small ones, so a model learns from fewer tokens. For
matrices inside the blocks only: embeddings, heads, norms and biases stay with AdamW.

The nearest orthogonal matrix comes from an iteration of matrix products (Newton and Schulz), in bfloat16 where the chip multiplies it:
the result's singular values lie near 1 (0.7 to 1.2), which is all that is needed. On a matrix of (m, n), m at most n, an iteration
takes 4 m^2 n + 2 m^3 operations; five of them cost as much as 5 m tokens do in the forward and backward pass (n = m).

Not an option of `fastgpt train`: the checkpoints know AdamW's moments.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the iteration, Jordan's: steep at 0, so that small singular values grow fast


def orthogonalize(matrix: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values near 1.

    Args:
        matrix: (m, n), any dtype.
        iterations: of Newton and Schulz; each multiplies small singular values by about 3.4.
        dtype: of the products.

    Returns:
        (m, n) in `dtype`.

    Raises:
        ValueError: not two dimensions.

    Example:
        >>> torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0])), dtype=torch.float32)).round(decimals=1)
        tensor([1.1000, 0.8000])
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix: got shape {tuple(matrix.shape)}; accepted: two dimensions")
    a, b, c = COEFFICIENTS
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    wide = x.shape[0] <= x.shape[1]
    if not wide:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT  # (m, m), the smaller side
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices.

    Args:
        params: parameters of two dimensions, or groups of them. A group's `parts` says of how many matrices, one below the other, each
            of its parameters consists (3 for queries, keys and values in one); each is made orthogonal by itself.
        lr: how far an update moves; 0.02 suits most sizes, as updates have the same norm whatever the gradient's.
        momentum: mu.
        weight_decay: decoupled, times lr.
        iterations, dtype: of `orthogonalize`.

    Raises:
        ValueError: a parameter that is no matrix, or whose rows are not divided by `parts`.

    Example:
        >>> optimizer = Muon(block_matrices(model), lr=0.02)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(params, defaults)
        self.iterations, self.dtype = iterations, dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2 or p.shape[0] % group["parts"]:
                    raise ValueError(
                        f"params: got shape {tuple(p.shape)}; accepted: matrices whose rows {group['parts']} divides"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. A gradient's norm does not matter, so there is nothing to clip."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, mu, parts = group["lr"], group["momentum"], group["parts"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                ahead = p.grad.lerp(state["momentum"].lerp_(p.grad, 1 - mu), mu)
                found = [orthogonalize(part, self.iterations, self.dtype) for part in ahead.chunk(parts)]
                scale = max(1.0, p.shape[0] / parts / p.shape[1]) ** 0.5
                p.mul_(1 - rate * group["weight_decay"]).add_(torch.cat(found).to(p.dtype), alpha=-rate * scale)
        return loss


def block_matrices(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The groups of a GPT's matrices for `Muon`: all inside the blocks, with queries, keys and values apart.

    Raises:
        ValueError: fewer heads of keys and values than of queries, whose parts have unequal sizes.
    """
    config: Any = model.config
    if config.kv_heads != config.n_head:
        raise ValueError(f"n_kv_head: got {config.n_kv_head} with n_head {config.n_head}; accepted: as many")
    blocks: Any = model.h
    named = [(name, p) for name, p in blocks.named_parameters() if p.dim() == 2]
    qkv = [p for name, p in named if name.endswith("c_attn.weight")]
    rest = [p for name, p in named if not name.endswith("c_attn.weight")]
    return [{"params": qkv, "parts": 3}, {"params": rest, "parts": 1}]
