"""The AdamW that an accelerated GPT's `configure_optimizers` makes: torch's, in one call a step."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.compat.adamw import AdamW

SHAPES = [(65, 32), (32,), (128, 32), (7,), (1, 1)]
RATES: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, with and without decay, as nanoGPT makes them."""
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1, "fused": True},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "fused": True},
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """New gradients; every second step one parameter has none, so that its count of steps is another."""
    generator = torch.Generator().manual_seed(10 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i == 2 and step % 2 else grad.to(p.dtype)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each call of the op was given."""
    calls: list[int] = []
    original: Callable[..., None] = ops.adamw

    def counting(params: list[Tensor], *rest: Any, **options: Any) -> None:
        calls.append(len(params))
        original(params, *rest, **options)

    monkeypatch.setattr("fastgpt.compat.adamw.ops.adamw", counting)
    return calls


def trained(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 6) -> list[Tensor]:
    """The parameters after some steps, the rate changed by a scheduler."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        scheduler.step()
    return [p.detach() for p in params]


def test_its_error_is_that_of_torchs_fused_step(called: list[int]) -> None:
    made = {
        name: parameters(dtype)
        for name, dtype in (("exact", torch.float64), ("torch", torch.float32), ("ours", torch.float32))
    }
    exact = trained(torch.optim.AdamW(groups(made["exact"]), **RATES), made["exact"])
    theirs = trained(torch.optim.AdamW(groups(made["torch"]), **RATES), made["torch"])
    ours = trained(AdamW(groups(made["ours"]), **RATES), made["ours"])
    assert called == [4, 4, 1, 4, 4, 1, 4]  # the first step is torch's; then those of one count of steps together
    for want, torch_got, got in zip(exact, theirs, ours, strict=True):
        limit = 2 * (torch_got - want).abs().max() + 1e-7
        assert (got - want).abs().max() <= limit


def test_the_state_is_torchs(called: list[int]) -> None:
    params, others = parameters(), parameters()
    ours, theirs = AdamW(groups(params), **RATES), torch.optim.AdamW(groups(others), **RATES)
    trained(ours, params)
    trained(theirs, others)
    assert called
    want, got = theirs.state_dict(), ours.state_dict()
    assert got["param_groups"] == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    for key, state in want["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(got["state"][key][name], value, rtol=1e-5, atol=1e-7)
    theirs.load_state_dict(got)
    ours.load_state_dict(want)
    calls = len(called)
    for optimizer, its in ((theirs, others), (ours, params)):
        set_gradients(its, 0)
        optimizer.step()
    assert len(called) > calls
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    assert all(type(copied) is AdamW and len(copied.state) == len(SHAPES) for copied in copies)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-3)}])
def test_options_that_the_op_lacks_go_to_torch(options: dict[str, Any], called: list[int]) -> None:
    made = [parameters() for _ in range(2)]
    for params, kind in zip(made, (AdamW, torch.optim.AdamW), strict=True):
        optimizer = kind(groups(params), **RATES | options)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
    assert not called
    for mine, theirs in zip(*made, strict=True):
        assert torch.equal(mine, theirs)


def test_other_parameters_go_to_torch(called: list[int]) -> None:
    for params in (parameters(torch.float64), [nn.Parameter(torch.randn(4, 6).t())]):
        optimizer = AdamW(params, fused=True, **RATES)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
    assert not called


def test_a_closure_is_evaluated_and_its_loss_returned(called: list[int]) -> None:
    params = parameters()
    optimizer = AdamW(groups(params), **RATES)

    def closure() -> float:
        set_gradients(params, 0)
        return 2.5

    assert [optimizer.step(closure) for _ in range(2)] == [2.5, 2.5]
    assert not called


def test_hooks_run_once_a_step_on_both_roads(called: list[int]) -> None:
    torch.optim.AdamW(parameters())  # its class has its step wrapped now
    params, seen = parameters(), []
    optimizer = AdamW(groups(params), **RATES)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
        assert seen == ["before", "after"] * (step + 1)
    assert called
