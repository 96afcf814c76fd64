"""Rung 3, four heads of a quarter of the width: the same number of weights, four things to look for at once."""

from setting import N_HEAD, STEPS, Text, fit, options, record
from step2_one_head import Heads, Model

if __name__ == "__main__":
    given = options(__doc__)
    text = Text(given.data)
    record(
        "four heads", fit(text, lambda: Model(text.vocab_size, Heads(N_HEAD)), steps=given.steps or STEPS), given.out
    )
