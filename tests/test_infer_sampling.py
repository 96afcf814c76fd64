"""The sampling filters against their definition in plain Python, and the draws against the probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.infer import candidates, sample_logits


def plain(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """The definition: probabilities of the tokens that remain after temperature, top-k and top-p, for logits without ties."""
    order = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: -logits[i])
    if temperature == 0:
        return {order[0]: 1.0}
    if top_k:
        order = order[:top_k]
    weights = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    if top_p is not None:
        total, held, kept = sum(weights.values()), 0.0, []
        for i in order:
            kept.append(i)
            held += weights[i] / total
            if held >= top_p:
                break
        weights = {i: weights[i] for i in kept}
    total = sum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


# Multiples of 1/8: exact in fp32, so that no two different logits meet after scaling.
LOGITS = st.lists(st.integers(-60, 60), min_size=1, max_size=40, unique=True).map(lambda xs: [x / 8 for x in xs])


@settings(max_examples=300, deadline=None)
@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
    top_k=st.none() | st.integers(0, 50),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_what_remains_and_its_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    probabilities, ids = candidates(torch.tensor([logits]), temperature, top_k, top_p)
    want = plain(logits, temperature, top_k, top_p)
    got = {int(i): float(p) for i, p in zip(ids[0], probabilities[0], strict=True) if p > 0}
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    # At a threshold that a cumulative sum meets to within rounding either answer is right, and so it is for a probability that fp32
    # cannot hold; elsewhere only one is.
    for token in set(got) ^ set(want):
        ahead = sum(p for i, p in plain(logits, temperature, top_k, None).items() if logits[i] > logits[token])
        assert (top_p is not None and abs(ahead - top_p) < 1e-5) or want.get(token, 1.0) < 1e-30
    if set(got) == set(want):
        for token, p in want.items():
            assert got[token] == pytest.approx(p, rel=1e-4, abs=1e-7)


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.integers(-2, 2), min_size=1, max_size=30), top_k=st.integers(1, 30))
def test_ties_leave_exactly_k_of_the_largest(logits: list[int], top_k: int) -> None:
    probabilities, ids = candidates(torch.tensor([logits], dtype=torch.float32), 1.0, top_k)
    kept = [int(i) for i, p in zip(ids[0], probabilities[0], strict=True) if p > 0]
    assert len(kept) == len(set(kept)) == min(top_k, len(logits))
    dropped = set(range(len(logits))) - set(kept)
    assert all(logits[k] >= logits[d] for k in kept for d in dropped)


@pytest.mark.parametrize(
    "settings_", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 4, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_probabilities(settings_: dict) -> None:
    logits = torch.tensor([2.0, 1.0, -0.5, 0.25, 1.5])
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    draws = sample_logits(logits.expand(n, 5), **settings_, generator=generator)
    want = plain(logits.tolist(), settings_.get("temperature", 1.0), settings_.get("top_k"), settings_.get("top_p"))
    counts = torch.bincount(draws, minlength=5)
    assert {i for i in range(5) if counts[i]} == set(want)
    for token, p in want.items():
        assert abs(counts[token].item() / n - p) <= 5 * math.sqrt(p * (1 - p) / n)


def test_rows_are_independent_of_each_other() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 1.0, 0.9]])
    probabilities, ids = candidates(logits, top_p=0.6)
    for row in range(2):
        alone_p, alone_ids = candidates(logits[row : row + 1], top_p=0.6)
        assert torch.equal(probabilities[row], alone_p[0])
        assert torch.equal(ids[row], alone_ids[0])


def test_greedy_is_the_largest_and_draws_nothing() -> None:
    logits = torch.randn(6, 100)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert torch.equal(sample_logits(logits, 0, top_k=3, top_p=0.1, generator=generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6, 1e30, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[3e4, -3e4, 1.0, 2.9e4, -math.inf]])
    probabilities, ids = candidates(logits, temperature)
    assert probabilities.isfinite().all()
    if temperature < 1:
        assert ids[0, probabilities.argmax()] == 0
        assert probabilities.max() == 1
    else:
        torch.testing.assert_close(probabilities, torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]]))


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), -math.inf)
    logits[0, [3, 30]] = 1.0
    for settings_ in ({}, {"top_k": 10}, {"top_p": 0.99}):
        draws = sample_logits(logits.expand(500, 50), **settings_)
        assert set(draws.tolist()) == {3, 30}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 30).to(dtype)
    probabilities, ids = candidates(logits, 0.7, 10, 0.9)
    want_probabilities, want_ids = candidates(logits.float(), 0.7, 10, 0.9)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, want_probabilities)
    assert torch.equal(ids, want_ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_k": 1.5}, "top_k: got 1.5"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_p": math.nan}, "top_p: got nan"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_logits(torch.zeros(1, 4), **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match=f"logits: the largest of a row is {bad}"):
        sample_logits(torch.tensor([[0.0, 1.0], [0.0, bad]]))
    with pytest.raises(ValueError, match="the largest of a row is -inf"):
        sample_logits(torch.full((1, 3), -math.inf))
    with pytest.raises(ValueError, match=r"logits: got shape \(3,\)"):
        sample_logits(torch.zeros(3))
