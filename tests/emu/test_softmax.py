"""csrc/cuda/softmax.cuh on the emulator: every kernel and dtype against the formula, in every mode, and planted bugs."""

import pytest
import torch
from parity import assert_parity, random

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from fastgpt.ops import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
BUGS = [
    Bug("a row read past its end", "row.cuh", "if (column < cols) raw[v] = load<kElements>(x + column);",
        "raw[v] = load<kElements>(x + column);"),
    Bug("partial sums read too soon", "row.cuh", "__syncthreads();  // every warp has written", ";"),
    Bug("one warp's sum", "row.cuh", "threadIdx.x % 32 < warps", "threadIdx.x % 32 < 1", expression=True),
    Bug("causal off by one", "softmax.cuh", "column < visible", "column <= visible", expression=True),
    Bug("no scale", "softmax.cuh", "x *= scale;", ";"),
    Bug("mask of another head", "softmax.cuh", "row / a.queries % a.heads", "row / a.queries % 1", expression=True),
    Bug("no rescaling of the sum", "row.cuh", "if (larger != top) sum *= expf(top - larger);", ";"),
    Bug("no rescaling between threads", "row.cuh", "if (largest != top) sum *= expf(top - largest);", ";"),
    Bug("rows past the last", "row_launch.cuh", "(rows + 3) / 4", "rows / 4", expression=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("softmax", BUGS)


def check(emulator: Emulator, shape: tuple[int, int, int, int], dtype: torch.dtype, *, scale: float = 1.0,
          causal: bool = False, masked: bool = False, log: bool = False, magnitude: float = 1.0,
          mode: tuple[str, str] = MODES[0], seed: int = 0, bug: str | None = None) -> list[torch.Tensor]:  # fmt: skip
    """Result and gradient by the kernels, held to the rule."""
    x = random(*shape, dtype=dtype, seed=seed, scale=magnitude)
    mask = random(1, *shape[1:], seed=seed + 1) if masked else None
    strides = (0, shape[2] * shape[3], shape[3]) if masked else (0, 0, 0)
    y, dx = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    options = (*strides, *shape, scale, causal, log)
    run = {"mode": mode, "seed": seed, "bug": bug}
    emulator("softmax", TYPES.index(dtype), x, None, y, mask, *options, 0, **run)
    grad = random(*shape, dtype=dtype, seed=seed + 2)
    emulator("softmax", TYPES.index(dtype), grad, y, dx, mask, *options, 1, **run)

    def formula(v: torch.Tensor) -> torch.Tensor:
        if log:
            return reference.log_softmax(v)
        return reference.softmax(
            v, None if mask is None else mask.to(v.dtype if v.dtype == torch.float64 else torch.float32), scale, causal
        )

    def gradient(y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return reference.log_softmax_backward(g, y) if log else reference.softmax_backward(g, y, scale)

    assert_parity(y, formula(x), formula(x.double()), "forward")
    assert_parity(dx, gradient(y, grad), gradient(y.double(), grad.double()), "backward")
    return [y, dx]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 8, 97, 113, 512, 1025, 2048])
@pytest.mark.parametrize("log", [False, True])
def test_rows_of_every_kernel(emulator: Emulator, cols: int, dtype: torch.dtype, log: bool) -> None:
    check(emulator, (1, 1, 3, cols), dtype, scale=1.0 if log else 0.7, log=log, magnitude=3.0, seed=cols)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_as_wide_as_gpt2s_vocabulary(emulator: Emulator, dtype: torch.dtype) -> None:
    check(emulator, (1, 1, 1, 50304), dtype)


@pytest.mark.parametrize("cols", [8200, 8201, 16392])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_rows_that_no_block_holds(emulator: Emulator, cols: int, causal: bool) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(emulator, (1, 2, 2, cols), dtype, scale=0.5, causal=causal, masked=True, magnitude=3.0)


def test_the_widest_row(emulator: Emulator) -> None:
    check(emulator, (1, 1, 1, 262144), torch.bfloat16, log=True)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 2, 7, 97), (1, 2, 9, 16), (1, 2, 3, 1032)])
@pytest.mark.parametrize("masked", [False, True])
def test_masks(emulator: Emulator, shape: tuple[int, int, int, int], masked: bool) -> None:
    check(emulator, shape, torch.bfloat16, scale=0.3, causal=shape[2] <= shape[3], masked=masked)


def test_values_that_are_not_finite(emulator: Emulator) -> None:
    x = torch.randn(5, 16)
    x[1] = -torch.inf
    x[2, 3], x[3, 4], x[4, 5] = torch.inf, torch.nan, -torch.inf
    for log, x in ((log, x[:, :cols].contiguous()) for log in (False, True) for cols in (16, 15)):
        y = torch.zeros_like(x)
        emulator("softmax", 0, x, None, y, None, 0, 0, 0, 1, 1, 5, x.shape[1], 1.0, False, log, 0)
        expected = torch.log_softmax(x, -1) if log else torch.softmax(x, -1)
        torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str]) -> None:
    for shape in ((1, 1, 6, 72), (1, 1, 2, 1544), (1, 1, 2, 333)):
        first = check(emulator, shape, torch.bfloat16)
        for one, other in zip(first, check(emulator, shape, torch.bfloat16, mode=mode), strict=True):
            assert torch.equal(one, other)


def test_a_race_is_caught_where_values_are_right(emulator: Emulator) -> None:
    x = random(1, 1544)
    y = torch.full_like(x, float("nan"))
    call = ("thread", "softmax", 0, x, None, y, None, 0, 0, 0, 1, 1, 1, 1544, 1.0, 0, 0, 0)
    emulator.sanitized(*call)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    with pytest.raises(EmulationError, match="data race"):
        emulator.sanitized(*call, bug="partial sums read too soon")


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    def passes(mode: tuple[str, str], seed: int) -> bool:
        try:
            check(emulator, (1, 2, 5, 104), torch.float32, scale=0.5, causal=True, masked=True, mode=mode, bug=bug)
            check(emulator, (1, 2, 3, 1544), torch.float32, scale=0.5, mode=mode, seed=seed, bug=bug)
            check(emulator, (1, 1, 2, 1545), torch.float32, magnitude=3.0, mode=mode, seed=seed, bug=bug)
        except (EmulationError, AssertionError):
            return False
        return True

    assert not all(passes(mode, seed) for seed in range(3) for mode in MODES)
