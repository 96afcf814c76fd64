"""The choice of the next token from logits: greedy, or drawn after temperature, top-k and top-p, in that order.

    temperature   p = softmax(logits / temperature); 0 means the most probable token, always
    top_k         of those, the k most probable
    top_p         of those, renormalised, the fewest of the most probable that together reach top_p (arXiv:1904.09751,
                  3.1): the token that crosses the threshold is in, so there is always one

What is left is renormalised and drawn from. Arithmetic is fp32 whatever the logits' dtype. Where logits are exactly
equal at a boundary, exactly k (or the fewest that reach top_p) still remain, and which of the equals do is not defined.

No repetition penalty, no min-p, no beam search.
"""

import math

import torch


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises for settings outside their ranges."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}; accepted: 0 (greedy) or a finite number above it")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k: got {top_k!r}; accepted: a whole number of at least 1, or 0 or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}; accepted: above 0 up to 1, or None for no limit")


def candidates(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn and their probabilities.

    Args:
        logits: (B, V), any floating dtype; -inf excludes a token.
        temperature: finite, 0 or above; 0 leaves the most probable token only.
        top_k: how many of the most probable tokens may be drawn; None, 0 or V and above: all.
        top_p: how much probability they need to hold, in (0, 1]; None or 1: all.

    Returns:
        (probabilities, ids): (B, K) fp32 that sum to 1 in each row, 0 for what is excluded; and (B, K) int64. Sorted by
        falling probability, unless neither top_k nor top_p excludes anything.

    Raises:
        ValueError: a setting out of its range, logits that are not (B, V), or a row whose largest logit is NaN or
            infinite.

    Example:
        >>> candidates(torch.tensor([[0.0, 2.0, 1.0]]), top_k=1)
        (tensor([[1.]]), tensor([[1]]))
    """
    _check(temperature, top_k, top_p)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}; accepted: (B, V)")
    logits = logits.float()
    vocab_size = logits.shape[1]
    largest, greedy = logits.max(dim=-1, keepdim=True)  # (B, 1); NaN wins a maximum
    if not torch.isfinite(largest).all():
        raise ValueError(
            f"logits: the largest of a row is {largest[~torch.isfinite(largest)][0].item()}; it must be finite"
        )
    if temperature == 0:
        return torch.ones_like(largest), greedy
    k = top_k if top_k is not None and 0 < top_k < vocab_size else None
    p = top_p if top_p is not None and top_p < 1 else None
    # At most 0, so that a small temperature cannot overflow; within fp32's range, so that 0 / 0 and inf / inf cannot arise.
    scaled = (logits - largest) / min(max(temperature, 1e-37), 1e37)
    if k is not None:
        scaled, ids = scaled.topk(k)
    elif p is not None:
        scaled, ids = scaled.sort(dim=-1, descending=True)
    else:
        ids = torch.arange(vocab_size, device=logits.device).expand_as(logits)
    probabilities = scaled.softmax(dim=-1)  # (B, K)
    if p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # what the tokens ahead of each one hold
        # The first is kept in any case: a cumulative sum minus its own term need not be exactly 0.
        excluded = before >= p
        excluded[:, 0] = False
        probabilities = probabilities.masked_fill(excluded, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities, ids


def sample_logits(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token id for each row of logits.

    Args:
        logits: (B, V), any floating dtype; -inf excludes a token.
        temperature, top_k, top_p: as `candidates`.
        generator: the source of randomness, on the logits' device; torch's default generator where None. Temperature 0
            draws nothing.

    Returns:
        (B,) int64.

    Raises:
        ValueError: as `candidates`.

    Example:
        >>> sample_logits(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0)
        tensor([1])
    """
    probabilities, ids = candidates(logits, temperature, top_k, top_p)
    if ids.shape[1] == 1:
        return ids[:, 0]
    drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]
