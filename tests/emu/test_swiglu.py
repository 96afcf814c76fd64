"""csrc/cuda/swiglu.cuh on the emulator: gate and up as the halves of one tensor and apart, against the formulas, and planted bugs."""

import pytest
import torch
from parity import assert_parity, random

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from fastgpt.ops import reference
from fastgpt.ops.bias_activation import KINDS

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
BUGS = [
    Bug("steps of y for the gate", "swiglu.cuh", "row * a.gate_stride", "row * a.cols", expression=True),
    Bug("gradients one after another", "swiglu_launch.cuh", "n % kWide<T> == 0", "true", expression=True),
    Bug("past the end", "swiglu.cuh", "i < total", "i <= total", expression=True),
    Bug("gradient without up", "swiglu.cuh", "g * to_float(up.v[e])", "g", expression=True),
    Bug("gate's slope for up", "swiglu.cuh", "g * activate<kKind>(x)", "g * activate_backward<kKind>(1.0f, x)", expression=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("swiglu", BUGS)


def check(emulator: Emulator, kind: str, rows: int, cols: int, dtype: torch.dtype, **run: object) -> None:
    both, grad = random(rows, 2 * cols, dtype=dtype, scale=2.0), random(rows, cols, dtype=dtype, seed=1)
    y, dboth = torch.full_like(grad, float("nan")), torch.full_like(both, float("nan"))
    numbers = (TYPES.index(dtype), KINDS[kind])
    emulator("swiglu", *numbers, both, None, None, y, None, rows, cols, **run)
    emulator("swiglu", *numbers, both, None, grad, dboth, None, rows, cols, **run)
    gate, up = (half.contiguous() for half in both.chunk(2, -1))
    apart, dgate, dup = (torch.full_like(grad, float("nan")) for _ in range(3))
    emulator("swiglu", *numbers, gate, up, None, apart, None, rows, cols, **run)
    emulator("swiglu", *numbers, gate, up, grad, dgate, dup, rows, cols, **run)
    assert torch.equal(apart, y)
    assert torch.equal(torch.cat([dgate, dup], -1), dboth)
    options = {"silu": (), "gelu": ("none",), "gelu_tanh": ("tanh",)}[kind]
    name = "geglu" if options else "swiglu"
    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    assert_parity(y, forward(both, None, *options), forward(both.double(), None, *options))
    wide = backward(grad.double(), both.double(), None, *options)[0]
    assert_parity(dboth, backward(grad, both, None, *options)[0], wide)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_units(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    for rows, cols in ((1, 1), (3, 97), (5, 64), (2, 1025), (4, 2048)):
        check(emulator, kind, rows, cols, dtype)


@pytest.mark.parametrize("mode", MODES[::4], ids="-".join)
@pytest.mark.parametrize("bug", [None, *(bug.name for bug in BUGS)])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str | None, mode: tuple[str, str]) -> None:
    def run() -> None:
        for cols in (64, 97):
            check(emulator, "silu", 3, cols, torch.float32, mode=mode, bug=bug)

    if bug is None:
        run()
    else:
        with pytest.raises((EmulationError, AssertionError)):
            run()
