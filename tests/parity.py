"""The one tolerance rule, and the one way to compare an engine with the formula.

An engine's error against the formula in float64 is at most twice torch's own error in the same dtype, plus one rounding of the largest
value; NaN and infinities stand where the formula has them (torch's gelu(inf) is NaN, so torch's are no measure).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def assert_parity(ours: Tensor, torchs: Tensor, exact: Tensor, what: str = "") -> None:
    """Hold `ours` to the rule, given torch's result in the same dtype and the exact one in float64."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == torchs.dtype, f"{what}: dtype {ours.dtype}, expected {torchs.dtype}"
    rounded = exact.detach().to(ours.dtype)  # so that overflow is where the dtype has it
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        assert torch.equal(test(ours), test(rounded)), f"{what}: {name} in other places than the formula's"
    finite = torch.isfinite(rounded)
    if not bool(finite.any()):
        return
    ours, torchs, exact = (x.detach().double()[finite] for x in (ours, torchs, exact))
    error = (ours - exact).abs().max().item()
    torch_error = (torchs - exact).abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    limit = 2 * torch_error + torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= limit, f"{what}: error {error:.3g} is over the limit {limit:.3g} (torch's {torch_error:.3g})"


def check_op(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    what: str = "",
    seed: int = 99,
) -> None:
    """Result and gradients of an op against torch's function in the same dtype and the formula in float64.

    The formula's gradients come from torch's autograd through it, so they do not depend on our own backward formulas.
    """
    results, gradients = [], []
    for function, wide in ((ours, False), (torchs, False), (formula, True)):
        leaves = [(x.detach().double() if wide else x.detach().clone()).requires_grad_() for x in inputs]
        leaves = [leaf if wide else _with_strides_of(leaf, x) for leaf, x in zip(leaves, inputs, strict=True)]
        y = function(*leaves)
        grad = random(*y.shape, seed=seed, dtype=torch.float64).to(y.dtype if not wide else torch.float64)
        if wide:
            grad = grad.to(results[0].dtype).double()  # the same gradient, rounded the same way, for all three
        results.append(y)
        gradients.append(torch.autograd.grad(y, leaves, grad))
    assert_parity(results[0], results[1], results[2], f"{what} forward")
    for i, (mine, theirs, exact) in enumerate(zip(*gradients, strict=True)):
        assert_parity(mine, theirs, exact, f"{what} gradient {i}")


def _with_strides_of(leaf: Tensor, like: Tensor) -> Tensor:
    """A leaf with the strides that a test's view has."""
    if like.is_contiguous():
        return leaf
    view = torch.empty_strided(like.shape, like.stride(), dtype=leaf.dtype)
    return view.copy_(leaf.detach()).requires_grad_()
