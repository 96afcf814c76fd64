"""Tile sizes of the Triton kernels: the table by architecture, and triton.autotune where the environment asks for it."""

import pytest
import torch
import torch.nn.functional as F
from parity import random
from triton.runtime.autotuner import Autotuner
from triton_engine import DEVICE, gpu, triton_engine  # noqa: F401

from fastgpt import ops
from fastgpt.kernels import launch, tuning

pytestmark = pytest.mark.usefixtures("triton_engine")


@pytest.fixture
def measured(monkeypatch):
    """Autotuning is asked for, and a stub times it: each candidate runs once, the last one is the fastest. Holds what was run."""
    runs = []

    def benchmark(self, call, quantiles):
        call()
        runs.append(self.base_fn.__name__)
        return [1.0 / len(runs)] * 3

    monkeypatch.setenv("FASTGPT_AUTOTUNE", "1")
    monkeypatch.setattr(Autotuner, "do_bench", property(lambda self: lambda *args, **kw: benchmark(self, *args, **kw)))
    tuning._tuner.cache_clear()
    yield runs
    tuning._tuner.cache_clear()


def test_asked_for_by_the_environment(monkeypatch):
    for value, wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FASTGPT_AUTOTUNE", value)
        assert tuning.asked() is wanted
    monkeypatch.delenv("FASTGPT_AUTOTUNE")
    assert not tuning.asked()


def test_candidates_are_every_combination():
    made = tuning.candidates(BLOCK=(1, 2), num_warps=(4, 8))
    assert len(made) == 4
    assert {"BLOCK": 2, "num_warps": 4} in made


def test_sizes_by_architecture(monkeypatch):
    x = torch.empty(1)
    for architecture, wanted in ((80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (120, 100)):
        monkeypatch.setattr(tuning, "architecture", lambda _, a=architecture: a)
        assert tuning.sizes(x) is tuning.SIZES[wanted]
        for rows, cols in ((1, 1), (7, 65), (1000, 768), (3, 16384)):
            block_m, block_n = tuning.tile(x, rows, cols)
            assert cols <= block_n < 2 * cols
            assert block_m == 1 or block_m * block_n <= tuning.sizes(x).elements
            assert tuning.warps(x, block_m * block_n) in (4, 8, 16)


OPS = {
    "gelu": (lambda x: ops.gelu(x), F.gelu, {"activation_fwd_kernel", "activation_bwd_kernel"}),
    "swiglu": (
        lambda x: ops.swiglu(x),
        lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        {"gated_fwd_kernel", "gated_bwd_kernel"},
    ),
    "softmax": (lambda x: ops.softmax(x), lambda x: x.softmax(-1), {"softmax_fwd_kernel", "softmax_bwd_kernel"}),
    "layer_norm": (
        lambda x: ops.layer_norm(x, (96,)),
        lambda x: F.layer_norm(x, (96,)),
        {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"},
    ),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, torch.arange(5, device=x.device)),
        lambda x: F.cross_entropy(x, torch.arange(5, device=x.device)),
        {"cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"},
    ),
    "attention": (
        lambda x: ops.attention(*x.view(3, 1, 1, 5, 32).unbind(), is_causal=True),
        lambda x: F.scaled_dot_product_attention(*x.view(3, 1, 1, 5, 32).unbind(), is_causal=True),
        {"attention_fwd_kernel", "attention_bwd_kv_kernel", "attention_bwd_q_kernel"},
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_the_fastest_candidate_is_run_and_kept(name, measured):
    ours, theirs, kernels = OPS[name]

    def step(function):
        x = random(5, 96).to(DEVICE).requires_grad_()
        out = function(x)
        out.backward(torch.ones_like(out) / (1 + torch.arange(out.numel(), device=DEVICE).view_as(out)))
        return out.detach(), x.grad

    first = step(ours)
    assert set(measured) == kernels
    assert min(measured.count(kernel) for kernel in kernels) > 2
    seen = len(measured)
    again = step(ours)
    assert len(measured) == seen
    for mine, twice, wanted in zip(first, again, step(theirs), strict=True):
        assert torch.equal(mine, twice)
        torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=2e-6)


def test_new_sizes_are_measured_anew(measured):
    ops.relu(random(5, 96).to(DEVICE))
    seen = len(measured)
    ops.relu(random(5, 97).to(DEVICE))
    assert len(measured) == 2 * seen


def test_logits_that_become_their_gradient_are_not_run_twice(measured):
    logits, target = random(7, 65).to(DEVICE), torch.arange(7, device=DEVICE)
    wanted = logits.clone().requires_grad_()
    F.cross_entropy(wanted, target, reduction="sum").backward()
    torch.ops.fastgpt.cross_entropy_inplace.default(logits, target, -100, "none", 0.0, 0.0)
    assert "cross_entropy_bwd_kernel" not in measured
    torch.testing.assert_close(logits, wanted.grad)


def test_without_asking_nothing_is_measured(measured, monkeypatch):
    monkeypatch.setenv("FASTGPT_AUTOTUNE", "0")
    ops.relu(random(5, 96).to(DEVICE))
    assert measured == []


class TestRealSizes:
    pytestmark = gpu

    def test_a_measured_choice_gives_the_same_numbers(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        q, k, v = (torch.randn(2, 12, 1024, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        plain = ops.attention(q, k, v, is_causal=True)
        monkeypatch.setenv("FASTGPT_AUTOTUNE", "1")
        torch.testing.assert_close(ops.attention(q, k, v, is_causal=True), plain, rtol=2e-2, atol=2e-2)
        assert list(tmp_path.rglob("*.autotune.json"))
        assert launch.architecture(q) >= 80
