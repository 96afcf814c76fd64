"""Muon against the singular value decomposition, step by step against its formula, and on a model."""

import copy

import pytest
import torch

from fastgpt.model import GPT, GPTConfig
from fastgpt.train.muon import Muon, block_matrices, orthogonalize


def near_orthogonal(matrix: torch.Tensor, factor: float) -> torch.Tensor:
    """What the iteration makes of a matrix, singular value by singular value, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return factor * (u * s) @ v


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (1, 5)])
def test_singular_vectors_stay_and_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = 100 * torch.randn(shape)
    found = orthogonalize(matrix, dtype=torch.float32)
    torch.testing.assert_close(found.double(), near_orthogonal(matrix, 1.0), atol=2e-5, rtol=0)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.3
    rough = orthogonalize(matrix)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - found).norm() < 0.05 * found.norm()


@pytest.mark.parametrize(("shape", "parts", "scale"), [((6, 9), 1, 1.0), ((18, 6), 3, 1.0), ((16, 4), 1, 2.0)])
def test_two_steps_are_the_formulas(shape: tuple[int, int], parts: int, scale: float) -> None:
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(shape))
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon(
        [{"params": [weight], "parts": parts}], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float32
    )
    for _ in range(2):
        weight.grad = torch.randn(shape)
        gradient = weight.grad.double()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = 0.1 * gradient + 0.9 * momentum
        step = torch.cat([near_orthogonal(part, scale) for part in ahead.chunk(parts)])
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * step
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), expected, atol=1e-5, rtol=0)


def test_a_models_matrices_and_nothing_else() -> None:
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True, position="rope"))
    groups = block_matrices(model)
    assert [len(group["params"]) for group in groups] == [2, 6]
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(48, 16)}
    others = {id(p) for p in model.parameters()} - {id(p) for group in groups for p in group["params"]}
    assert id(model.wte.weight) in others
    with pytest.raises(ValueError, match="n_kv_head: got 1"):
        block_matrices(GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)))


def test_a_loaded_state_goes_on_the_same() -> None:
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(4, 4))
    first = Muon([weight])
    weight.grad = torch.randn(4, 4)
    first.step()
    again = torch.nn.Parameter(weight.detach().clone())
    second = Muon([again])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weight.grad = torch.randn(4, 4)
    again.grad = weight.grad.clone()
    first.step()
    second.step()
    assert torch.equal(weight, again)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match="whose rows 3 divides"):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "parts": 3}])
    with pytest.raises(ValueError, match="two dimensions"):
        orthogonalize(torch.zeros(2, 2, 2))
