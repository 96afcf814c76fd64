"""csrc/cuda/activation.cuh and dropout.cuh on the emulator, against the formulas, and planted bugs."""

import pytest
import torch
from parity import assert_parity, random

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from fastgpt.ops import reference
from fastgpt.ops.bias_activation import KINDS
from fastgpt.ops.dropout import threshold
from fastgpt.ops.reference.activation import by_name

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
BUGS = [
    Bug("elements past the end", "activation.cuh", "i < end", "i <= end", expression=True),
    Bug("the tail left out", "activation_launch.cuh", "a.n / kWide<T> * kWide<T>", "a.n", expression=True),
    Bug("nine rounds", "philox.cuh", "round < 10", "round < 9", expression=True),
    Bug("the key stays", "philox.cuh", "key1 += 0xBB67AE85u;", ";"),
    Bug("dropped past the end", "dropout.cuh", "if (first + e >= a.n) continue;", ";"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("pointwise", BUGS)


def check_activation(emulator: Emulator, kind: str, n: int, dtype: torch.dtype, **run: object) -> None:
    forward, backward = by_name(kind), by_name(kind, backward=True)
    x, grad = random(n, dtype=dtype, scale=3.0, seed=n), random(n, dtype=dtype, seed=n + 1)
    y, dx = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    emulator("activation", TYPES.index(dtype), KINDS[kind], x, None, y, n, **run)
    kept = y if kind in reference.KEEPS_RESULT else x
    emulator("activation", TYPES.index(dtype), KINDS[kind], grad, kept, dx, n, **run)
    assert_parity(y, forward(x), forward(x.double()), kind)
    assert_parity(dx, backward(grad, kept), backward(grad.double(), kept.double()), f"{kind} gradient")


def check_dropout(emulator: Emulator, n: int, dtype: torch.dtype, skip: int = 0, residual: torch.dtype | None = None,
                  seed: int = 0x123456789ABCDEF, **run: object) -> None:  # fmt: skip
    x = random(n + skip, dtype=dtype)
    r = None if residual is None else random(n, dtype=residual, seed=1)
    out = dtype if residual is None else residual
    y = torch.full((n,), float("nan"), dtype=out)
    key, p = torch.tensor(seed), 0.3
    types = (TYPES.index(dtype), TYPES.index(out))
    emulator("dropout", *types, x, r, y, n, key.reshape(1), threshold(p), 1 / (1 - p), skip, **run)
    assert_parity(y, reference.dropout(x[skip:], r, key, p), reference.dropout(
        x[skip:].double(), None if r is None else r.double(), key, p))  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    for n in (1, 7, 97, 4096, 5003):
        check_activation(emulator, kind, n, dtype)


def test_a_tensor_longer_than_the_grid(emulator: Emulator) -> None:
    check_activation(emulator, "relu", 132 * 16 * 256 * 8 + 8 * 1025 + 3, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite(emulator: Emulator, kind: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e30, -1e30, 88.0, -104.0])
    y = torch.zeros_like(x)
    emulator("activation", 0, KINDS[kind], x, None, y, 8)
    expected = by_name(kind)(x)
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "skip"), [(1, 0), (97, 0), (1025, 0), (4096, 0), (1024, 1), (97, 3)])
def test_dropout_has_the_mask_of_the_formula(emulator: Emulator, n: int, skip: int, dtype: torch.dtype) -> None:
    check_dropout(emulator, n, dtype, skip)
    check_dropout(emulator, n, dtype, skip, residual=dtype)
    check_dropout(emulator, n, dtype, skip, residual=torch.float32, seed=7)


@pytest.mark.parametrize("mode", MODES[::4], ids="-".join)
@pytest.mark.parametrize("bug", [None, *(bug.name for bug in BUGS)])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str | None, mode: tuple[str, str]) -> None:
    def run() -> None:
        check_activation(emulator, "gelu", 4097, torch.float32, mode=mode, bug=bug)
        check_dropout(emulator, 1023, torch.float32, mode=mode, bug=bug)

    if bug is None:
        run()
    else:
        with pytest.raises((EmulationError, AssertionError)):
            run()
