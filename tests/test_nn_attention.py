"""CausalSelfAttention against the formula written out head by head, and its promises on causality, caches and dropout."""

import math

import pytest
import torch

from fastgpt import nn
from fastgpt.infer.cache import LayerKVCache


def plain(layer: nn.CausalSelfAttention, x: torch.Tensor, n_head: int, n_kv_head: int) -> torch.Tensor:
    """The layer's formula with explicit loops over heads and a masked T x T matrix."""
    _, T, C = x.shape
    D = C // n_head
    qkv = x @ layer.c_attn.weight.T
    if layer.c_attn.bias is not None:
        qkv = qkv + layer.c_attn.bias
    heads = []
    for h in range(n_head):
        g = h // (n_head // n_kv_head)
        q = qkv[..., h * D : (h + 1) * D]
        k = qkv[..., C + g * D : C + (g + 1) * D]
        v = qkv[..., C + (n_kv_head + g) * D : C + (n_kv_head + g + 1) * D]
        scores = q @ k.transpose(1, 2) / math.sqrt(D)  # (B, T, T)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    y = torch.cat(heads, dim=-1) @ layer.c_proj.weight.T
    return y if layer.c_proj.bias is None else y + layer.c_proj.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
def test_the_formula_and_its_gradients(n_kv_head: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.CausalSelfAttention(48, 6, n_kv_head=n_kv_head, bias=bias).double()
    x = torch.randn(2, 11, 48, dtype=torch.float64)
    grad = torch.randn(2, 11, 48, dtype=torch.float64)
    results = []
    for forward in (layer, lambda t: plain(layer, t, 6, n_kv_head)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


def test_a_position_does_not_see_what_follows() -> None:
    torch.manual_seed(0)
    layer = nn.CausalSelfAttention(32, 4)
    x = torch.randn(2, 9, 32)
    changed = x.clone()
    changed[:, 5:] = torch.randn(2, 4, 32)
    torch.testing.assert_close(layer(x)[:, :5], layer(changed)[:, :5])
    assert not torch.allclose(layer(x)[:, 5:], layer(changed)[:, 5:])


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 4], [1, 8], [8, 1]], ids=str)
def test_a_cache_read_in_chunks_gives_the_whole_sequence(chunks: list[int], n_kv_head: int) -> None:
    torch.manual_seed(0)
    layer = nn.CausalSelfAttention(32, 4, n_kv_head=n_kv_head)
    x = torch.randn(2, 9, 32)
    cache = LayerKVCache(max_tokens=9)
    with torch.no_grad():
        pieces = torch.cat([layer(chunk, cache) for chunk in x.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(pieces, layer(x))


def test_dropout_acts_in_training_only_and_scales_what_it_keeps() -> None:
    torch.manual_seed(0)
    layer = nn.CausalSelfAttention(64, 4, dropout=0.25)
    x = torch.randn(4, 50, 64)
    kept = layer(x)
    whole = layer.eval()(x)
    zero = kept == 0
    assert 0.22 < zero.float().mean().item() < 0.28
    torch.testing.assert_close(kept[~zero], whole[~zero] / 0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_head": 5}, "n_head: got 5; n_embd = 48"),
        ({"n_head": 0}, "n_head: got 0"),
        ({"n_head": 6, "n_kv_head": 4}, "n_kv_head: got 4; n_head = 6"),
        ({"n_head": 6, "n_kv_head": 0}, "n_kv_head: got 0"),
    ],
)
def test_heads_that_do_not_divide_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.CausalSelfAttention(48, **arguments)
