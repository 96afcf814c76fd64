"""The race to a fixed loss, on a small text."""

import pytest

pytest.importorskip("pytest_benchmark")

from fastgpt.benchmarks import race_mark


def test_race_to_a_mark_stops_the_clock_where_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole recipe on a small text: the losses fall, the rates end at zero, and a mark out of reach is not claimed."""
    small = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}
    monkeypatch.setattr(race_mark, "SHAPE", {**race_mark.SHAPE, **small})
    monkeypatch.setattr(race_mark, "EVAL_EVERY", 5)
    text = "".join(f"line {number % 7} of the text, and one more.\n" for number in range(200))
    found = race_mark.run_to(text, 0.0, seed=1, steps=30)
    losses = [loss for _, _, loss in found["curve"]]
    assert found["our_seconds"] is None
    assert [step for step, _, _ in found["curve"]] == [5, 10, 15, 20, 25, 30]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    again = race_mark.run_to(text, losses[2], seed=1, steps=30)
    assert again["curve"][-1][0] == 15
    assert again["our_seconds"] == again["curve"][-1][1] > 0
    assert again["tokens"] == 15 * race_mark.BATCH * 16
    shares = [race_mark.rate_share(step, 40) for step in range(41)]
    assert shares[0] == 1 / race_mark.WARMUP
    assert max(shares) == shares[race_mark.WARMUP] == 1.0
    assert shares[40] == 0.0
