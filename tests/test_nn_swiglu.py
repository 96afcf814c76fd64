"""nn.SwiGLU: values and gradients against plain torch, sizes, names, autocast."""

import pytest
import torch
import torch.nn.functional as F
from parity import random

from fastgpt import nn


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_torchs(bias):
    torch.manual_seed(0)
    layer = nn.SwiGLU(24, 40, bias=bias)
    x = random(2, 5, 24).requires_grad_()

    def plain(x):
        return layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))

    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(layer(x), plain(x))
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), leaves) for f in (layer, plain))
    torch.testing.assert_close(mine, theirs)


def test_names_and_the_default_width():
    assert {name: tuple(p.shape) for name, p in nn.SwiGLU(96).named_parameters()} == {
        "gate_proj.weight": (256, 96),
        "up_proj.weight": (256, 96),
        "down_proj.weight": (96, 256),
    }
    assert nn.SwiGLU(100).gate_proj.out_features == 320  # 266.7 rounded up to a multiple of 64
    assert nn.SwiGLU(8, bias=True).down_proj.bias is not None


def test_autocast_and_compile():
    layer, x = nn.SwiGLU(8), random(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
