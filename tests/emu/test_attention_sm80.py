"""csrc/cuda/attention_sm80.cuh and its backward on the emulator."""

import pytest
import torch

from emu.attention_cases import Case, check
from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

FORWARD, BACKWARD, TILES = "attention_sm80.cuh", "attention_sm80_backward.cuh", "attention_tiles.cuh"
BUGS = [
    Bug("K read before it is there", FORWARD, "__syncthreads();  // K is there", ";  // K is there"),
    Bug("V read before it is there", FORWARD, "__syncthreads();  // V is there", ";  // V is there"),
    Bug("mask off by one", FORWARD, "column > last", "column > last + 1", expression=True),
    Bug("no mask on the last keys", FORWARD, "ragged || diagonal", "diagonal", expression=True),
    Bug("sums not rescaled", FORWARD, "out[t][n][2 * half] *= shrink;", ";"),
    Bug("sum not rescaled", FORWARD, "sum[t][half] * shrink + partial", "sum[t][half] + partial", expression=True),
    Bug("wrong key head", FORWARD, "head / (p.heads / p.kv_heads)", "head % p.kv_heads", expression=True),
    Bug("diagonal of the square", FORWARD, "row + offset", "row", expression=True),
    Bug("chunks that share banks", TILES, "row & 7", "row & 3", expression=True),
    Bug("wrong half of the operand", TILES, "2 * k + lane / 16", "2 * k", expression=True),
    Bug("rows past the end are stored", TILES, "if (row >= rows) continue;", ";"),
    Bug("delta left out", BACKWARD, "weight * (ds[0][n][i] - delta[i / 2])", "weight * ds[0][n][i]", expression=True),
    Bug("keys' mask off by one", BACKWARD, "row > first + column + offset", "row >= first + column + offset", expression=True),
    Bug("starts too late", BACKWARD, "max(0, first_key - offset)", "max(0, first_key - offset + BLOCK_M)", expression=True),
    Bug("one head of the group", BACKWARD, "blocks * group", "blocks", expression=True),
]  # fmt: skip
CASES = [
    Case(64, 64),
    Case(1, 1),
    Case(97, 113, causal=True),
    Case(113, 97, causal=True, heads=4, kv_heads=2, batch=2),
    Case(130, 70, 32),
    Case(97, 200, 96, causal=True),
    Case(113, 97, 128, causal=True),
    Case(200, 257, 128),
    Case(3, 130, causal=True, dtype=torch.float16),
    Case(97, 97, causal=True, dtype=torch.float16, magnitude=3.0),
]
# Small, and yet every planted bug shows: two steps of keys, a ragged end, groups, queries that see nothing.
BROKEN = [Case(97, 65, causal=True, heads=2, kv_heads=1), Case(65, 129, causal=True, heads=4, kv_heads=2), Case(33, 97)]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("attention_sm80", BUGS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(emulator: Emulator, case: Case) -> None:
    check(emulator, case)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str], dim: int) -> None:
    case = Case(97, 130, dim, causal=True)
    for first, again in zip(check(emulator, case), check(emulator, case, mode=mode, seed=5), strict=True):
        assert torch.equal(first, again)


def test_a_long_row(emulator: Emulator) -> None:
    check(emulator, Case(17, 1025, causal=True))


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    for mode in [MODES[0], ("random", "lazy"), ("warp priority", "random")]:
        for case in BROKEN:
            try:
                check(emulator, case, mode=mode, seed=3, bug=bug)
            except (EmulationError, AssertionError):
                return
    pytest.fail("no mode saw it")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_sanitizer_reports(emulator: Emulator, sanitizer: str) -> None:
    check(emulator, Case(65, 97, causal=True), sanitizer=sanitizer)


def test_thread_sanitizer_finds_a_missing_barrier(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match="data race"):
        check(emulator, Case(64, 128), sanitizer="thread", bug="V read before it is there")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(8, 8, 80), "head_dim: expected 32, 64, 96 or 128, got 80"),
        (Case(8, 8, heads=3, kv_heads=2), "heads a multiple of kv_heads"),
    ],
)
def test_what_is_not_covered_raises(emulator: Emulator, case: Case, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        check(emulator, case)
