"""csrc/cuda/norm.cuh and its wrappers on the emulator: every kernel and mix of dtypes against the formulas, and planted bugs."""

from typing import Any

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from emu.engine import implementation, on_emulator
from fastgpt.ops import backend, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BUGS = [
    Bug("pairs read too soon", "row.cuh", "__syncthreads();  // every pair is there", ";"),
    Bug("the gradient of the sum left out", "norm.cuh", "dx.v[e] += more.v[e];", ";"),
    Bug("the bias's part in the weight's place", "norm.cuh", "part[cols + column + e] = dbias[v][e];",
        "part[column + e] = dbias[v][e];"),
    Bug("a part too few", "column_sum.cuh", "part < a.count", "part < a.count - 1", expression=True),
    Bug("sums read too soon", "column_sum.cuh", "__syncthreads();  // every row of threads has written", ";"),
    Bug("columns past the end", "norm.cuh", "if (column >= a.cols) return;", ";"),
    Bug("the sum not rounded", "norm.cuh", "return a.residual != nullptr ? to_float(summed[j]) : to_float(x[j]);",
        "return to_float(x[j]) + (a.residual != nullptr ? to_float(residual[j]) : 0.0f);"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("norm", BUGS)


def doubles(*args: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in args]


def hold(ours: tuple[Tensor, ...], formula: Any, args: tuple[Any, ...], what: str) -> None:
    """Each result to the rule; results that were not asked for are empty."""
    for i, (mine, theirs, exact) in enumerate(zip(ours, formula(*args), formula(*doubles(*args)), strict=True)):
        assert_parity(mine, theirs, exact, f"{what} result {i}")


def check(
    emulator: Emulator, rows: int, cols: int, dtype: torch.dtype, *, params: torch.dtype | None = None, x: torch.dtype | None = None,
    rms: bool = False, weighted: bool = True, **run: Any,
) -> list[Tensor]:  # fmt: skip
    """The norm alone and after a residual, forward and backward, held to the rule; returns all results."""
    weight = random(cols, dtype=params or dtype, seed=1) if weighted else None
    bias = random(cols, dtype=params or dtype, seed=2) if weighted else None
    some = [weight] if rms else [weight, bias]
    name = "rms_norm" if rms else "layer_norm"
    inputs, residual = random(rows, cols, dtype=dtype, seed=3) + 0.5, random(rows, cols, dtype=dtype, seed=4)
    grad, grad_sum = random(rows, cols, dtype=dtype, seed=5), random(rows, cols, dtype=dtype, seed=6)
    needs_half = dtype == F32
    with on_emulator(emulator, **run):
        alone = implementation(name)(inputs, *some, 1e-5)
        back = implementation(f"{name}_backward")(grad, inputs, weight, *alone[1:], True)
        left = inputs if x is None else inputs.to(x)
        added = implementation(f"add_{name}")(left, residual, *some, 1e-5)
        summed, statistics = added[1], added[2:]
        more = (grad, grad_sum, summed, weight, *statistics, True, needs_half)
        add_back = implementation(f"add_{name}_backward")(*more)
    formulas = reference.__dict__
    hold(alone, formulas[name], (inputs, *some, 1e-5), name)
    hold(back, formulas[f"{name}_backward"], (grad, inputs, weight, *alone[1:], True), f"{name} backward")
    assert torch.equal(summed, left + residual)
    hold((added[0], *statistics), formulas[name], (summed, *some, 1e-5), f"add_{name}")
    dx, half, *gradients = add_back
    assert torch.equal(half, dx.to(BF16) if needs_half else half.new_empty(0))
    formula = formulas[f"add_{name}_backward"]

    def without_half(*args: Any) -> list[Tensor]:
        dx, _, *gradients = formula(*args)
        return [dx, *gradients]

    hold((dx, *gradients), without_half, more, f"add_{name} backward")
    return [*alone, *back, *added, *add_back]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("cols", [1, 8, 97, 113, 768, 1025, 1536])
def test_rows_of_every_kernel(emulator: Emulator, cols: int, dtype: torch.dtype, rms: bool) -> None:
    check(emulator, 3, cols, dtype, rms=rms)


@pytest.mark.parametrize(
    ("cols", "dtype"), [(5120, F32), (8192, F32), (8200, F32), (10240, BF16), (12296, BF16), (16384, F16)]
)
def test_wide_rows(emulator: Emulator, cols: int, dtype: torch.dtype) -> None:
    check(emulator, 1, cols, dtype)


@pytest.mark.parametrize("cols", [97, 768])
def test_mixed_dtypes(emulator: Emulator, cols: int) -> None:
    for half in (BF16, F16):
        check(emulator, 3, cols, half, params=F32)
        check(emulator, 3, cols, F32, x=half, rms=True)
    check(emulator, 3, cols, F32, x=BF16, weighted=False)
    check(emulator, 3, cols, BF16, weighted=False, rms=True)


def test_more_rows_than_parts(emulator: Emulator) -> None:
    check(emulator, 601, 16, BF16)
    check(emulator, 601, 7, F32)


def test_addresses_that_are_not_aligned(emulator: Emulator) -> None:
    for dtype in (F32, BF16):
        x, weight = random(2 * 72 + 1, dtype=dtype)[1:].view(2, 72), random(73, dtype=dtype, seed=1)[1:]
        with on_emulator(emulator, guarded=False):
            ours = implementation("layer_norm")(x, weight, None, 1e-5)
        hold(ours, reference.layer_norm, (x, weight, None, 1e-5), "not aligned")


def test_strides_and_no_elements(emulator: Emulator) -> None:
    x, weight, bias = random(16, 3).t(), random(16, seed=1), random(16, seed=2)
    with on_emulator(emulator):
        hold(
            implementation("layer_norm")(x, weight, bias, 1e-5),
            reference.layer_norm,
            (x, weight, bias, 1e-5),
            "strides",
        )
        empty = torch.empty(0, 16)
        assert implementation("layer_norm")(empty, weight, bias, 1e-5)[0].shape == (0, 16)
        _, dweight, dbias = implementation("layer_norm_backward")(empty, empty, weight, empty[:, 0], empty[:, 0], True)
        assert torch.equal(dweight, torch.zeros(16))
        assert torch.equal(dbias, torch.zeros(16))
        for wrong in ((x.double(), weight.double()), (x, weight.half())):
            with pytest.raises(backend.NotCovered):
                implementation("rms_norm")(*wrong, 1e-5)


@pytest.mark.parametrize("mode", MODES[1::3], ids="-".join)
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str]) -> None:
    for cols in (72, 1544):
        for one, other in zip(
            check(emulator, 5, cols, F32), check(emulator, 5, cols, F32, mode=mode, seed=3), strict=True
        ):
            assert torch.equal(one, other)


def test_a_race_is_caught_where_values_are_right(emulator: Emulator) -> None:
    parts = random(9, 1, 33)
    total = torch.full((33,), float("nan"))
    grad = random(9, 33)
    rstd = torch.ones(9)
    call = (
        "thread",
        "norm_backward",
        0,
        0,
        grad,
        None,
        grad,
        None,
        None,
        rstd,
        torch.empty_like(grad),
        None,
        total,
        None,
        parts,
        9,
        9,
        33,
    )
    emulator.sanitized(*call)
    assert_parity(total, (grad * grad).sum(0), (grad.double() ** 2).sum(0))
    with pytest.raises(EmulationError, match="data race"):
        emulator.sanitized(*call, bug="sums read too soon")


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    def passes(mode: tuple[str, str], seed: int) -> bool:
        try:
            check(emulator, 3, 1544, F32, mode=mode, seed=seed, bug=bug)
            check(emulator, 9, 33, BF16, mode=mode, seed=seed, bug=bug)
        except (EmulationError, AssertionError):
            return False
        return True

    assert not all(passes(mode, seed) for seed in range(2) for mode in MODES[::2])
