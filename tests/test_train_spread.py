"""200 steps of training with our ops against the same model in plain torch: no further from it than torch is from itself.

Torch's own run-to-run spread is what a change of every weight by one rounding does. Ours round elsewhere in every step, so they may be
four times as far; a gradient that is wrong by a thousandth is a hundred times as far in float32.
"""

import contextlib

import pytest
import torch
from paths import shared

from fastgpt.benchmarks.plain_gpt import PlainGPT, plain_optimizer
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.optimizer import build_optimizer, clip_scale

CONFIG = GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=64, bias=False, activation="gelu")
OPTIONS = {"learning_rate": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.99)}


@pytest.fixture(scope="module")
def ids():
    text = shared("data/tinyshakespeare.txt").read_text()
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return torch.tensor([letters[letter] for letter in text[:200_000]])


def losses(ids, ours, dtype, noise=None):
    torch.manual_seed(1)
    model = GPT(CONFIG)
    if not ours:
        plain = PlainGPT(CONFIG)
        plain.load_state_dict(model.state_dict())
        model = plain
    if noise is not None:
        generator = torch.Generator().manual_seed(noise)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2**-24 * torch.randn(p.shape, generator=generator))
    optimizer = (build_optimizer if ours else plain_optimizer)(model, **OPTIONS)
    generator, found = torch.Generator().manual_seed(2), []
    for _ in range(200):
        starts = torch.randint(len(ids) - 33, (8,), generator=generator)
        batch = torch.stack([ids[start : start + 33] for start in starts])
        half = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
        with half:
            inputs = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            _, loss = model(*inputs, need_logits=False) if ours else model(*inputs)
        loss.backward()
        if ours:
            optimizer.step(grad_scale=clip_scale(optimizer.grad_norm(), 1.0))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_stay_within_torchs_own_spread(ids, dtype):
    torchs = losses(ids, False, dtype)
    assert torchs[-50:].mean() < 2.7 < torchs[0]

    def distance(other):
        return (other - torchs)[-50:].abs().mean().item()

    spread = max(distance(losses(ids, False, dtype, noise)) for noise in (1, 2))
    assert distance(losses(ids, True, dtype)) <= 4 * spread
