"""The emulator itself: that right kernels pass in every mode and that broken ones never do."""

from collections.abc import Callable

import pytest
import torch

from emu.build import Bug, compiler, translate
from emu.emulator import MODES, EmulationError, Emulator

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

BUGS = [
    Bug("first barrier missing", "rows.cuh", "__syncthreads();  // first", ";  // first"),
    Bug("second barrier missing", "rows.cuh", "__syncthreads();  // second", ";  // second"),
    Bug("third barrier missing", "rows.cuh", "__syncthreads();  // third", ";  // third"),
    Bug("barrier not for all", "rows.cuh", "__syncthreads();  // first", "if (warp != 1) __syncthreads();"),
    Bug("early exit", "rows.cuh", "largest = warp_max(largest);", "if (threadIdx.x >= columns) return; largest = warp_max(largest);"),
    Bug("index past the row", "rows.cuh", "columns - 1 - j", "columns - j", expression=True),
    Bug("writes past the row", "rows.cuh", "y[j] = expf(row[j] - largest) / sum;", "y[j + 1] = expf(row[j] - largest) / sum;"),
    Bug("wrong warp", "rows.cuh", "if (lane == 0) partial[warp] = sum;", "if (lane == 0) partial[0] = sum;"),
    Bug("too short a reduction", "rows.cuh", "sum = warp_sum(sum);", "sum += __shfl_xor_sync(0xffffffffu, sum, 8);"),
    Bug("a warp in part", "rows.cuh", "largest = warp_max(largest);", "if (lane < 16) largest = warp_max(largest);"),
    Bug("wait for too few", "rows.cuh", "fastgpt::ptx::cp_async_wait<1>();", "fastgpt::ptx::cp_async_wait<2>();"),
    Bug("no barrier after the copy", "rows.cuh", "__syncthreads();  // arrived", ";  // arrived"),
    Bug("overwrites what is read", "rows.cuh", "__syncthreads();  // free again", ";  // free again"),
    Bug("never waits", "rows.cuh", "  fastgpt::ptx::cp_async_wait<0>();", ";"),
]  # fmt: skip
SOFTMAX = [bug.name for bug in BUGS[:10]]
COPY = [bug.name for bug in BUGS[10:]]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("rows", BUGS)


def softmax(
    emulator: Emulator, columns: int, mode: tuple[str, str] = MODES[0], seed: int = 0, bug: str | None = None
) -> None:
    x = torch.randn(3, columns)
    y = torch.full_like(x, float("nan"))
    emulator("row_softmax", x, y, 3, columns, mode=mode, seed=seed, bug=bug)
    torch.testing.assert_close(y, torch.softmax(x, -1), rtol=1e-5, atol=1e-6)


def copy(
    emulator: Emulator, vectors: int, mode: tuple[str, str] = MODES[0], seed: int = 0, bug: str | None = None
) -> None:
    x = torch.randint(0, 1 << 30, (vectors, 4), dtype=torch.int32)
    y = torch.zeros_like(x)
    emulator("staged_copy", x, y, vectors, 64, mode=mode, seed=seed, bug=bug)
    assert torch.equal(x, y)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("columns", [1, 97, 113, 128, 1025])
def test_a_right_kernel_passes(emulator: Emulator, mode: tuple[str, str], columns: int) -> None:
    softmax(emulator, columns, mode=mode, seed=columns)
    copy(emulator, columns, mode=mode, seed=columns)


def caught(run: Callable[[tuple[str, str], int], None], attempts: int = 3) -> bool:
    """Whether one of the modes sees it: an error, or a wrong result."""
    for seed in range(attempts):
        for mode in MODES:
            try:
                run(mode, seed)
            except (EmulationError, AssertionError):
                return True
    return False


@pytest.mark.parametrize("bug", SOFTMAX)
def test_planted_bugs_of_the_softmax_are_caught(emulator: Emulator, bug: str) -> None:
    assert caught(lambda mode, seed: softmax(emulator, 97, mode=mode, seed=seed, bug=bug))


@pytest.mark.parametrize("bug", COPY)
def test_planted_bugs_of_the_copy_are_caught(emulator: Emulator, bug: str) -> None:
    assert caught(lambda mode, seed: copy(emulator, 300, mode=mode, seed=seed, bug=bug))


@pytest.mark.parametrize(
    ("bug", "report"),
    [
        ("early exit", "left the kernel while others of its warp wait for it in __shfl_xor_sync with mask ffffffff"),
        ("barrier not for all", r"deadlock\n +32 threads \(32 to 63\) left the kernel"),
        ("writes past the row", "out of bounds of memory|written beside"),
        ("a warp in part", "part|deadlock"),
        ("never waits", "never waited for"),
    ],
)
def test_a_report_says_what_is_wrong(emulator: Emulator, bug: str, report: str) -> None:
    run = copy if bug in COPY else softmax
    with pytest.raises(EmulationError, match=report):
        run(emulator, 100, mode=("random", "lazy"), bug=bug)


def test_a_kernel_that_passes_stays_so_after_one_that_failed(emulator: Emulator) -> None:
    for bug in ("early exit", "writes past the row", "barrier not for all"):
        with pytest.raises((EmulationError, AssertionError)):
            softmax(emulator, 100, mode=("warp priority", "eager"), bug=bug)
        softmax(emulator, 100)


def test_a_launch_past_the_limits_raises(emulator: Emulator) -> None:
    x = torch.zeros(60000)
    with pytest.raises(EmulationError, match="240000 bytes of shared memory"):
        emulator("row_softmax", x, x.clone(), 1, 60000)
    with pytest.raises(EmulationError, match="grid that is empty"):
        emulator("row_softmax", x, x.clone(), 0, 1)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_a_right_kernel_has_no_report(emulator: Emulator, sanitizer: str) -> None:
    x = torch.randn(3, 97)
    y = torch.full_like(x, float("nan"))
    emulator.sanitized(sanitizer, "row_softmax", x, y, 3, 97)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    x, y = torch.ones(300, 4), torch.zeros(300, 4)
    emulator.sanitized(sanitizer, "staged_copy", x, y, 300, 64)
    assert torch.equal(x, y)


@pytest.mark.parametrize("bug", ["first barrier missing", "second barrier missing", "third barrier missing"])
def test_thread_sanitizer_finds_missing_barriers_under_the_plainest_schedule(emulator: Emulator, bug: str) -> None:
    x = torch.randn(1, 97)
    with pytest.raises(EmulationError, match=r"data race(.|\n)*row_softmax_kernel"):
        emulator.sanitized("thread", "row_softmax", x, x.clone(), 1, 97, bug=bug)


def test_address_sanitizer_finds_a_write_past_an_argument(emulator: Emulator) -> None:
    x = torch.randn(1, 97)
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        emulator.sanitized("address", "row_softmax", x, x.clone(), 1, 97, bug="writes past the row")


def test_shared_memory_is_declared_one_name_at_a_time() -> None:
    assert "emu_key_part" in translate("__shared__ alignas(16) float part[4][33];", "x.cuh")
    assert "shared_dynamic" in translate("extern __shared__ __align__(1024) unsigned char smem[];", "x.cuh")
    with pytest.raises(ValueError, match="one name a declaration"):
        translate("__shared__ float a, b[3];", "x.cuh")
