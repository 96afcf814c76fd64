"""The bigram baseline: the best guess of the next token from the last one alone, by counting. A GPT that does not beat
it has learnt nothing from its context.

    p(b)     = (c(b) + 1/2) / (N + V/2)
    p(b | a) = (max(c(a, b) - D, 0) + (S + D m(a)) p(b)) / (c(a) + S)

c counts tokens and pairs in the training text, N is the number of tokens, V the vocabulary, m(a) the number of
different tokens seen after a. Every pair loses the discount D and every row gains S imagined tokens drawn from the
unigram distribution; what is taken goes back to the unigram, so each row sums to 1 and no pair has probability 0. D = 0
is additive smoothing towards the unigram, S = 0 absolute discounting; both together are the interpolated Pitman-Yor
form (Teh, 2006, "A hierarchical Bayesian language model based on Pitman-Yor processes", eq. 2).

S and D are chosen on the last tenth of the training tokens with counts from the first nine tenths, and the counts are
then taken anew from all of them. Validation text is never looked at.

Counts live in NumPy, sparse: memory follows the number of different pairs, not V squared. No longer context, and no
training by gradient.
"""

import itertools

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastgpt.errors import UserError

STRENGTHS = (0.0, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)  # S
DISCOUNTS = (0.0, 0.25, 0.5, 0.75, 0.9)  # D
HELD_OUT = 0.1  # of the training tokens, to choose S and D


class _Counts:
    """Pair and unigram counts of one text."""

    def __init__(self, tokens: NDArray[np.int64], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
        self.pairs, self.pair_counts = pairs, counts  # sorted codes a V + b, and c(a, b)
        first = pairs // vocab_size
        self.row_counts = np.bincount(tokens[:-1], minlength=vocab_size)  # c(a)
        self.row_kinds = np.bincount(first, minlength=vocab_size)  # m(a)
        token_counts = np.bincount(tokens, minlength=vocab_size)
        self.unigram = (token_counts + 0.5) / (len(tokens) + 0.5 * vocab_size)

    def look_up(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
        """c(a, b) for arrays of a and b; 0 for a pair that was not seen."""
        codes = first * self.vocab_size + second
        places = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
        return np.where(self.pairs[places] == codes, self.pair_counts[places], 0)


def _probabilities(
    pair_counts: NDArray[np.integer],
    row_counts: NDArray[np.integer],
    row_kinds: NDArray[np.integer],
    unigram: NDArray[np.floating],
    strength: float,
    discount: float,
) -> NDArray[np.float64]:
    """p(b | a) by the formula above, elementwise; the unigram's where nothing was ever seen after a."""
    kept = np.maximum(pair_counts - discount, 0.0)
    total = row_counts + strength
    smoothed = (kept + (strength + discount * row_kinds) * unigram) / np.maximum(total, 1e-300)
    return np.where(row_counts > 0, smoothed, unigram)


def _tokens(values: ArrayLike | torch.Tensor, name: str, vocab_size: int) -> NDArray[np.int64]:
    """Token ids of any integer kind as a flat int64 array, checked against the vocabulary."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: got dtype {array.dtype}; accepted: whole numbers")
    array = array.reshape(-1).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = int(array.min()) if array.min() < 0 else int(array.max())
        raise UserError(f"{name}: got token id {wrong}; accepted: 0 to vocab_size - 1 = {vocab_size - 1}")
    return array


class BigramModel:
    """A smoothed bigram, fitted by counting.

    Attributes:
        strength: the chosen S.
        discount: the chosen D.

    Example:
        >>> model = BigramModel().fit([0, 1] * 50, vocab_size=2)
        >>> bool(model.probabilities([0], [1])[0] > 0.99)
        True
    """

    def __init__(self) -> None:
        self.strength = 0.0
        self.discount = 0.0
        self._fitted: _Counts | None = None

    def fit(self, tokens: ArrayLike | torch.Tensor, vocab_size: int) -> "BigramModel":
        """Counts the training tokens and chooses the smoothing on a held-out tenth of them.

        Args:
            tokens: the training text, N ids of any integer dtype (an array, a memory map, a tensor), N of at least 20.
            vocab_size: V; every id is below it.

        Returns:
            The model itself.

        Raises:
            UserError: fewer than 20 tokens, an id out of range, or no whole numbers.
        """
        ids = _tokens(tokens, "tokens", vocab_size)
        if len(ids) < 20:
            raise UserError(f"tokens: got {len(ids)}; accepted: at least 20")
        split = len(ids) - int(len(ids) * HELD_OUT)
        counts, held_out = _Counts(ids[:split], vocab_size), ids[split - 1 :]
        first, second = held_out[:-1], held_out[1:]
        pairs, rows = counts.look_up(first, second), counts.row_counts[first]
        kinds, unigram = counts.row_kinds[first], counts.unigram[second]
        choices = [choice for choice in itertools.product(STRENGTHS, DISCOUNTS) if choice != (0.0, 0.0)]

        def held_out_loss(choice: tuple[float, float]) -> float:
            return -float(np.log(_probabilities(pairs, rows, kinds, unigram, *choice)).mean())

        self.strength, self.discount = min(choices, key=held_out_loss)
        self._fitted = _Counts(ids, vocab_size)
        return self

    def probabilities(self, inputs: ArrayLike | torch.Tensor, targets: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """p(target | input) of each pair.

        Args:
            inputs: N ids, any shape and integer dtype.
            targets: as many ids; targets[i] follows inputs[i].

        Returns:
            (N,) float64 probabilities, each above 0.

        Raises:
            UserError: the model has not been fitted, the lengths differ, or an id is out of range.
        """
        counts = self._fitted
        if counts is None:
            raise UserError("the bigram model has no counts yet: call fit(tokens, vocab_size) first")
        first, second = _tokens(inputs, "inputs", counts.vocab_size), _tokens(targets, "targets", counts.vocab_size)
        if len(first) != len(second):
            raise UserError(f"targets: got {len(second)} ids; accepted: as many as inputs, {len(first)}")
        return _probabilities(
            counts.look_up(first, second),
            counts.row_counts[first],
            counts.row_kinds[first],
            counts.unigram[second],
            self.strength,
            self.discount,
        )

    def loss(self, tokens: ArrayLike | torch.Tensor, targets: ArrayLike | torch.Tensor | None = None) -> float:
        """Mean cross-entropy in nats a token.

        Args:
            tokens: a text of N >= 2 ids, of which N - 1 are predicted; or, with targets, the inputs of any shape.
            targets: the tokens to predict, shaped as the inputs: what a GPT's evaluation passes, so that both losses
                are over the same predictions.

        Raises:
            UserError: as `probabilities`, or nothing to predict.

        Example:
            >>> BigramModel().fit([0, 1] * 50, vocab_size=2).loss([0, 1, 0, 1]) < 0.02
            True
        """
        if targets is None:
            ids = tokens.reshape(-1) if isinstance(tokens, torch.Tensor) else np.asarray(tokens).reshape(-1)
            tokens, targets = ids[:-1], ids[1:]
        probabilities = self.probabilities(tokens, targets)
        if not len(probabilities):
            raise UserError("tokens: nothing to predict; accepted: at least 2 tokens")
        return -float(np.log(probabilities).mean())

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[None, torch.Tensor]:
        """(None, loss) as a GPT returns (logits, loss), so that one evaluation loop takes either; the loss is a float64
        scalar tensor."""
        return None, torch.tensor(self.loss(idx, targets), dtype=torch.float64)
