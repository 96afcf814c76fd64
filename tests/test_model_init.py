"""The initialisation schemes: the standard deviations they promise, and what zeros does to training."""

import math

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT, INIT_SCHEMES, GPTConfig, init_weights

SHAPE = {"vocab_size": 200, "block_size": 64, "n_layer": 8, "n_head": 4, "n_kv_head": 2, "n_embd": 128}


def expected_std(scheme: str, name: str, shape: torch.Size) -> float:
    """The documented standard deviation of one matrix."""
    fan_out, fan_in = shape
    return {
        "gpt2": 0.005 if name.endswith("c_proj.weight") else 0.02,  # 0.02 / sqrt(2 * 8 layers)
        "normal": 0.02,
        "zeros": 0.0,
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "he": math.sqrt(2 / fan_in),
    }[scheme]


@pytest.mark.parametrize("scheme", INIT_SCHEMES)
def test_every_weight_has_its_documented_distribution(scheme: str) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, init=scheme))
    matrices = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(
                parameter, torch.full_like(parameter, float("ln_" in name and name.endswith("weight")))
            ), name
            continue
        matrices += 1
        std = expected_std(scheme, name, parameter.shape)
        # Five standard errors of a mean and of a standard deviation.
        n = parameter.numel()
        assert abs(parameter.mean().item()) <= 5 * std / math.sqrt(n), name
        assert abs(parameter.std().item() - std) <= 5 * std / math.sqrt(2 * n), name
    assert matrices == 2 + 4 * SHAPE["n_layer"]


def test_the_seed_decides() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in GPT(GPTConfig(**SHAPE)).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_zeros_train_nothing() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, init="zeros"))
    idx, targets = torch.randint(200, (2, 64)), torch.randint(200, (2, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        assert all(not p.grad.any() for p in model.parameters())
        optimizer.step()
    assert loss.item() == pytest.approx(math.log(200), rel=1e-6)


def test_gpt2_keeps_the_residual_stream_from_growing_with_depth() -> None:
    """The variance that 2 n_layer projections add to the stream must not depend on n_layer for gpt2, and must for normal."""

    def added_variance(scheme: str, n_layer: int) -> float:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SHAPE | {"n_layer": n_layer, "init": scheme}))
        start = model.wte.weight[torch.arange(64)][None] + model.wpe.weight
        x = start
        with torch.no_grad():
            for block in model.h:
                x = block(x)
        return (x - start).var().item()

    assert 0.5 < added_variance("gpt2", 32) / added_variance("gpt2", 4) < 2
    assert added_variance("normal", 32) / added_variance("normal", 4) > 5


def test_an_unknown_scheme_changes_nothing() -> None:
    model = GPT(GPTConfig(**SHAPE))
    before = model.wte.weight.clone()
    with pytest.raises(UserError, match="init: got 'kaiming'; accepted: gpt2, normal, zeros, xavier, he"):
        init_weights(model, "kaiming")
    assert torch.equal(model.wte.weight, before)
