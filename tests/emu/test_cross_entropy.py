"""csrc/cuda/cross_entropy.cuh and its wrappers on the emulator: every kernel against the formulas, and planted bugs."""

from typing import Any

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from emu.engine import implementation, on_emulator
from fastgpt.ops import backend, cuda_cross_entropy, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BUGS = [
    Bug("no rescaling of the sum", "row.cuh", "if (larger != top) sum *= expf(top - larger);", ";"),
    Bug("no rescaling between threads", "row.cuh", "if (largest != top) sum *= expf(top - largest);", ";"),
    Bug("log-sum-exp read too soon", "cross_entropy.cuh", "__syncthreads();  // the first thread has written", ";"),
    Bug("one class too few for the target", "cross_entropy.cuh", "target >= 0 && target < a.cols ? to_float(x[target]) : 0.0f",
        "target >= 0 && target < a.cols - 1 ? to_float(x[target]) : 0.0f", expression=True),
    Bug("no z-loss in the gradient", "cross_entropy.cuh", "2.0f * a.z_loss * near", "0.0f * near", expression=True),
    Bug("ignored rows counted", "cross_entropy.cuh", "count += a.target[row] != a.ignore_index;", "count += 1.0;"),
    Bug("sums of warps read too soon", "cross_entropy.cuh", "__syncthreads();  // every warp has written its sum", ";"),
    Bug("never scaled", "cross_entropy.cuh", "if (factor == 1.0f) return;", "return;"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("cross_entropy", BUGS)


def check(
    emulator: Emulator, rows: int, cols: int, dtype: torch.dtype, *, reduction: str = "mean", smoothing: float = 0.0,
    z_loss: float = 0.0, magnitude: float = 3.0, **run: Any,
) -> list[Tensor]:  # fmt: skip
    """Loss, log-sum-exps, gradient, and the gradient in the logits' place, held to the rule."""
    logits = random(rows, cols, dtype=dtype, scale=magnitude)
    target = torch.randint(cols, (rows,), generator=torch.Generator().manual_seed(1))
    target[0] = cols - 1
    if rows > 2:
        target[1] = -100
    options = (-100, reduction, smoothing, z_loss)
    replaced = logits.clone()
    with on_emulator(emulator, **run):
        loss, lse = implementation("cross_entropy")(logits, target, *options)
        grad = random(*loss.shape, seed=2)
        back = implementation("cross_entropy_backward")(grad, logits, target, lse, *options)
        again = implementation("cross_entropy_inplace")(replaced, target, *options)
        unscaled = replaced.clone()
        implementation("cross_entropy_inplace_backward")(replaced, grad)
    exact_loss, exact_lse = reference.cross_entropy(logits.double(), target, *options)
    assert_parity(loss, reference.cross_entropy(logits, target, *options)[0], exact_loss, "loss")
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(loss, again)

    def gradient(g: Tensor, wide: bool) -> Tensor:
        x = logits.double() if wide else logits
        return reference.cross_entropy_backward(g.double() if wide else g, x, target, exact_lse, *options)

    one = torch.ones_like(loss)
    assert_parity(back, gradient(grad, False), gradient(grad, True), "gradient")
    assert_parity(unscaled, gradient(one, False), gradient(one, True), "gradient in place")
    assert torch.equal(replaced, (unscaled.float() * (grad if grad.dim() == 0 else grad[:, None])).to(dtype))
    return [loss, lse, back, unscaled, replaced]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("cols", [1, 8, 97, 113, 512, 1025, 2048])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_of_every_kernel(emulator: Emulator, cols: int, dtype: torch.dtype, reduction: str) -> None:
    check(emulator, 5, cols, dtype, reduction=reduction)
    check(emulator, 3, cols, dtype, reduction="sum", smoothing=0.1, z_loss=1e-2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_as_wide_as_gpt2s_vocabulary(emulator: Emulator, dtype: torch.dtype) -> None:
    check(emulator, 1, 50304, dtype, smoothing=0.1)
    check(emulator, 1, 50257, dtype)


def test_the_widest_row(emulator: Emulator) -> None:
    check(emulator, 1, 262144, BF16, z_loss=1e-4)


def test_large_logits(emulator: Emulator) -> None:
    for cols in (97, 104, 1025):
        check(emulator, 3, cols, F32, magnitude=1e4)


def test_values_that_are_not_finite(emulator: Emulator) -> None:
    for cols in (16, 17, 1025):
        x = random(6, cols)
        x[1] = -torch.inf
        x[2, 3], x[3, 4], x[4, 5] = torch.inf, torch.nan, -torch.inf
        target = torch.tensor([0, 1, 2, 3, 5, 6])
        with on_emulator(emulator):
            loss, lse = implementation("cross_entropy")(x, target, -100, "none", 0.0, 0.0)
            dx = implementation("cross_entropy_backward")(torch.ones(6), x, target, lse, -100, "none", 0.0, 0.0)
        expected, expected_lse = reference.cross_entropy(x, target, -100, "none", 0.0)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        gradient = reference.cross_entropy_backward(torch.ones(6), x, target, expected_lse, -100, "none", 0.0)
        torch.testing.assert_close(dx, gradient, equal_nan=True)


def test_a_target_outside_is_nan_and_nothing_else_is(emulator: Emulator) -> None:
    for cols in (24, 25):
        x, target = random(4, cols), torch.tensor([3, cols, -1, -100])
        with on_emulator(emulator):
            loss, lse = implementation("cross_entropy")(x, target, -100, "none", 0.0, 0.0)
            dx = implementation("cross_entropy_backward")(torch.ones(4), x, target, lse, -100, "none", 0.0, 0.0)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [False, True, True, False]
        assert not dx[3].any()


def test_all_ignored_and_no_rows(emulator: Emulator) -> None:
    x, target = random(3, 24), torch.full((3,), -100)
    with on_emulator(emulator):
        replaced = x.clone()
        assert implementation("cross_entropy_inplace")(replaced, target, -100, "mean", 0.0, 0.0).isnan()
        assert not replaced.any()
        assert implementation("cross_entropy")(x, target, -100, "sum", 0.0, 0.0)[0] == 0.0
        assert implementation("cross_entropy")(x[:0], target[:0], -100, "sum", 0.0, 0.0)[0] == 0.0


def test_a_loss_of_one_is_not_scaled(emulator: Emulator) -> None:
    x = torch.full((2, 16), torch.inf)  # inf times 1 is inf, NaN where it were multiplied by 0
    with on_emulator(emulator):
        implementation("cross_entropy_inplace_backward")(x, torch.tensor([1.0, 0.0]))
    assert x[0].isinf().all()
    assert x[1].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy(
    emulator: Emulator, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_cross_entropy, "device_chunk_rows", lambda *_: 8)
    x, weight = random(37, 24, dtype=dtype), random(97, 24, dtype=dtype, seed=1)
    target = torch.randint(97, (37,), generator=torch.Generator().manual_seed(2))
    target[5] = -100
    options = (-100, reduction, 0.1)
    with on_emulator(emulator):
        ours = implementation("linear_cross_entropy")(x, weight, target, *options, dtype, True)
        alone = implementation("linear_cross_entropy")(x, weight, target, *options, dtype, False)
    theirs = reference.linear_cross_entropy(x, weight, target, *options, dtype, True)
    exact = reference.linear_cross_entropy(x.double(), weight.double(), target, *options, torch.float64, True)
    for mine, torchs, right in zip(ours, theirs, exact, strict=True):
        assert_parity(mine, torchs, right)
    assert torch.equal(alone[0], ours[0])
    assert alone[1].numel() == alone[2].numel() == 0


def test_what_is_not_covered(emulator: Emulator) -> None:
    target = torch.tensor([0, 1])
    with on_emulator(emulator):
        for logits in (random(2, 8, dtype=torch.float64), random(2, 0)):
            with pytest.raises(backend.NotCovered):
                implementation("cross_entropy")(logits, target, -100, "mean", 0.0)
        with pytest.raises(backend.NotCovered):
            implementation("cross_entropy_inplace")(random(8, 2).t(), target, -100, "mean", 0.0, 0.0)


@pytest.mark.parametrize("mode", MODES[1::3], ids="-".join)
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str]) -> None:
    for cols in (72, 1544, 1545):
        for one, other in zip(
            check(emulator, 5, cols, F32), check(emulator, 5, cols, F32, mode=mode, seed=3), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    def passes(mode: tuple[str, str], seed: int) -> bool:
        try:
            check(emulator, 40, 33, F32, z_loss=0.1, mode=mode, seed=seed, bug=bug)
            check(emulator, 3, 1544, F32, reduction="none", mode=mode, seed=seed, bug=bug)
        except (EmulationError, AssertionError):
            return False
        return True

    assert not all(passes(mode, seed) for seed in range(2) for mode in MODES[::2])
