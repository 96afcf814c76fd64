"""`with fastgpt.patched()`: torch's functional ops are ours within it, torch's own outside, with the same numbers and errors."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import check_op, random

import fastgpt
from fastgpt import ops
from fastgpt.compat import patch
from fastgpt.nn import fallback

TARGET = torch.tensor([0, 3, -100, 2])
CALLS: dict[str, Any] = {
    "layer_norm": lambda x, w: F.layer_norm(x, (8,), w, w),
    "rms_norm": lambda x, w: F.rms_norm(x, [8], w, eps=1e-5),
    "gelu": lambda x, w: F.gelu(x * w, approximate="tanh"),
    "silu": lambda x, w: F.silu(x * w),
    "tanh": lambda x, w: F.tanh(x * w),
    "sigmoid": lambda x, w: F.sigmoid(x * w),
    "softmax": lambda x, w: F.softmax(x * w, dim=-1),
    "log_softmax": lambda x, w: F.log_softmax(x * w, -1),
    "cross_entropy": lambda x, w: F.cross_entropy(x * w, TARGET, label_smoothing=0.1),
    "scaled_dot_product_attention": lambda x, w: F.scaled_dot_product_attention(
        *(x * w).view(1, 1, 4, 8).expand(3, 1, 2, 4, 8).unbind(), is_causal=True
    ),
}


def within(call: Any) -> Any:
    def run(*arguments: torch.Tensor) -> torch.Tensor:
        with fastgpt.patched():
            result: torch.Tensor = call(*arguments)
        return result

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_torch_s(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    check_op(within(call), call, call, [random(4, 8, dtype=dtype), random(8, dtype=dtype, seed=1)], name)


def test_linear_is_ours_for_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("weight", "weight, one thread"):
        monkeypatch.setitem(fallback.SMALLEST, limit, 0)
    x, w = random(3, 8), random(5, 8, seed=1)
    with torch.no_grad(), fastgpt.patched():
        assert torch.equal(F.linear(x, w), ops.linear(x, w))
        torch.testing.assert_close(torch.nn.Linear(8, 5)(x.repeat(20, 1)).shape, torch.Size([60, 5]))


def test_all_of_them_are_exchanged_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: getattr(F, name) for name in patch._OURS}
    assert set(CALLS) | {"linear"} == set(before)
    called: list[str] = []
    for name, ours in patch._OURS.items():
        monkeypatch.setitem(
            patch._OURS,
            name,
            lambda *args, ours=ours, name=name, **kwargs: called.append(name) or ours(*args, **kwargs),
        )
    seen = []

    def all_of_them() -> None:
        with fastgpt.patched():
            with fastgpt.patched():
                pass
            for call in CALLS.values():
                call(random(4, 8), random(8))
            other = threading.Thread(target=lambda: seen.append(F.gelu is not before["gelu"]))
            other.start()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        all_of_them()
    assert set(called) == set(CALLS)
    assert seen == [True]
    assert {name: getattr(F, name) for name in patch._OURS} == before


def test_what_ours_lack_and_errors_are_torch_s() -> None:
    x, mask = random(1, 2, 4, 8), torch.ones(4, 4).tril().log()
    weights, inner = torch.rand(8), torch.tensor([1.0, -1.0])
    calls: list[Any] = [
        lambda: F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
        lambda: torch.manual_seed(1) and F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),  # torch's masks
        lambda: F.cross_entropy(x[0, 0], TARGET, weight=weights),
        lambda: F.cross_entropy(x[0, 0], x[0, 1].softmax(-1)),
        lambda: F.silu(inner.clone(), inplace=True),
        lambda: F.softmax(x.half(), -1, dtype=torch.float32),
        lambda: F.gelu(x.double()),
        lambda: torch.nn.GELU()(x),
        lambda: torch.nn.Softmax(-1)(x),
    ]
    wrong: list[Any] = [
        lambda: F.layer_norm(x, (7,)),
        lambda: F.rms_norm(x, (7,)),
        lambda: F.cross_entropy(x[0, 0], TARGET[:3]),
        lambda: F.softmax(x, 7),
        lambda: F.gelu(TARGET),
        lambda: F.linear(x[0, 0], torch.zeros(3, 7)),
    ]
    for call in calls:
        torch.testing.assert_close(within(call)(), call())
    for call in wrong:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
            call()
        with torch.no_grad(), pytest.raises(type(theirs.value)):
            within(call)()


def test_compiles_within() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    x = random(20, 8)
    want = model(x)
    with fastgpt.patched():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
