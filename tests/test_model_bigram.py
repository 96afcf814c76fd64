"""The bigram baseline against its formula counted in plain Python, and as a baseline on real text."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import shared

from fastgpt.errors import UserError
from fastgpt.model import BigramModel


def plain(tokens: list[int], V: int, S: float, D: float, a: int, b: int) -> float:
    """p(b | a) counted with dictionaries."""
    pairs, first, single = Counter(itertools.pairwise(tokens)), Counter(tokens[:-1]), Counter(tokens)
    unigram = (single[b] + 0.5) / (len(tokens) + 0.5 * V)
    if not first[a]:
        return unigram
    kinds = len({y for x, y in pairs if x == a})
    return (max(pairs[a, b] - D, 0) + (S + D * kinds) * unigram) / (first[a] + S)


CASES = st.integers(1, 7).flatmap(
    lambda V: st.tuples(st.just(V), st.lists(st.integers(0, V - 1), min_size=20, max_size=80))
)


@settings(max_examples=100, deadline=None)
@given(case=CASES, strength=st.floats(0, 100), discount=st.floats(0.01, 1), chosen=st.booleans())
def test_the_formula_for_every_pair_and_rows_that_sum_to_one(
    case: tuple[int, list[int]], strength: float, discount: float, chosen: bool
) -> None:
    V, tokens = case
    model = BigramModel().fit(tokens, V)
    if not chosen:
        model.strength, model.discount = strength, discount
    a, b = np.meshgrid(np.arange(V), np.arange(V), indexing="ij")
    got = model.probabilities(a, b).reshape(V, V)
    want = [[plain(tokens, V, model.strength, model.discount, i, j) for j in range(V)] for i in range(V)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-12)
    assert (got > 0).all()


def test_loss_is_the_mean_over_the_predictions() -> None:
    rng = np.random.default_rng(0)
    train, text = rng.integers(0, 9, 500), rng.integers(0, 9, 41)
    model = BigramModel().fit(train, 9)
    S, D = model.strength, model.discount
    by_hand = -sum(math.log(plain(train.tolist(), 9, S, D, a, b)) for a, b in itertools.pairwise(text.tolist())) / 40
    assert model.loss(text) == pytest.approx(by_hand, rel=1e-12)
    x, y = torch.tensor(text[:-1]).view(5, 8), torch.tensor(text[1:]).view(5, 8)
    assert model.loss(x, y) == pytest.approx(by_hand, rel=1e-12)
    none, loss = model(x, y)
    assert none is None
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_any_integer_dtype_and_memory_maps(dtype: type, tmp_path) -> None:
    values = np.random.default_rng(1).integers(0, 60_000, 5000).astype(dtype)  # pair codes pass 2**31
    values.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r")
    assert BigramModel().fit(mapped, 60_000).loss(mapped) == BigramModel().fit(values.tolist(), 60_000).loss(
        values.tolist()
    )


def test_finds_a_first_order_source() -> None:
    """On text from a known Markov chain the loss comes close to the chain's entropy rate, which nothing can beat."""
    rng = np.random.default_rng(2)
    V, N = 12, 60_000
    chain = rng.dirichlet(np.full(V, 0.3), size=V)
    draws, edges = rng.random(N), chain.cumsum(axis=1)
    text = np.zeros(N, dtype=np.int64)
    for i in range(1, N):
        text[i] = min(np.searchsorted(edges[text[i - 1]], draws[i]), V - 1)
    train, held_out = text[: N // 2], text[N // 2 :]
    entropy = -np.log(chain[held_out[:-1], held_out[1:]]).mean()
    assert 0 <= BigramModel().fit(train, V).loss(held_out) - entropy < 0.01


def test_smoothing_is_chosen_without_validation_text_and_is_near_the_best() -> None:
    text = shared("data/tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text], dtype=np.uint16)
    split = int(0.9 * len(ids))
    train, val = ids[:split], ids[split:]
    model = BigramModel().fit(train, len(letters))
    loss = model.loss(val)
    assert 2.45 < loss < 2.52  # counted bigrams of this text and split; nanoGPT's GPT reaches 1.88
    chosen = model.strength, model.discount
    for strength in (0.0, 1.0, 16.0, 256.0):
        for discount in (0.1, 0.5, 0.9):
            model.strength, model.discount = strength, discount
            assert loss <= model.loss(val) + 0.002, chosen


def test_unseen_tokens_and_pairs_have_finite_loss() -> None:
    model = BigramModel().fit([0, 1] * 20, 50)
    assert math.isfinite(model.loss([49, 48, 0, 0, 7]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0] * 19, "tokens: got 19; accepted: at least 20"),
        ([0] * 30 + [5], "token id 5; accepted: 0 to vocab_size - 1 = 4"),
        ([0] * 30 + [-1], "token id -1"),
        ([0.5] * 30, "dtype float64"),
    ],
)
def test_bad_training_tokens_are_named(tokens: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BigramModel().fit(tokens, 5)


def test_bad_use_is_named() -> None:
    with pytest.raises(UserError, match="call fit"):
        BigramModel().loss([0, 1])
    model = BigramModel().fit([0, 1] * 20, 2)
    with pytest.raises(UserError, match="nothing to predict"):
        model.loss([0])
    with pytest.raises(UserError, match="targets: got 1 ids"):
        model.loss([0, 1], [0])
    with pytest.raises(UserError, match="inputs: got token id 2"):
        model.loss([2, 1])
