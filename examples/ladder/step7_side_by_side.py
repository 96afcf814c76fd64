"""Side by side on the package's own GPT of the same size: initialisation schemes, activations, learning rates too low and too high.

Every case has the same batches and 600 steps; what differs is the one thing named.
"""

import torch
from setting import BLOCK_SIZE, N_EMBD, N_HEAD, N_LAYER, Text, fit, options, record

from fastgpt import GPT, GPTConfig
from fastgpt.model.init import INIT_SCHEMES
from fastgpt.nn import ACTIVATIONS

RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def gpt(vocab_size: int, activation: str = "relu", init: str = "xavier") -> torch.nn.Module:
    """Three layers, four heads, 32 wide."""
    return GPT(
        GPTConfig(
            vocab_size=vocab_size,
            block_size=BLOCK_SIZE,
            n_layer=N_LAYER,
            n_head=N_HEAD,
            n_embd=N_EMBD,
            activation=activation,
            init=init,
        )
    )


def main() -> None:
    """All cases, one after the other."""
    given = options(__doc__)
    text, steps = Text(given.data), given.steps or 600
    for init in INIT_SCHEMES:
        record(f"init {init}", fit(text, lambda init=init: gpt(text.vocab_size, init=init), steps=steps), given.out)
    for activation in ACTIVATIONS:
        made = fit(text, lambda name=activation: gpt(text.vocab_size, activation=name), steps=steps)
        record(f"activation {activation}", made, given.out)
    for rate in RATES:
        result = fit(text, lambda: gpt(text.vocab_size), steps=steps, learning_rate=rate)
        record(f"learning rate {rate:g}", result, given.out)


if __name__ == "__main__":
    main()
