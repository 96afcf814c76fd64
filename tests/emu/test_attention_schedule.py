"""Which blocks attention_sm90 walks over, in which order: plain functions, and the list of packed sequences' tiles; by brute force."""

import itertools

import pytest
import torch

from emu.attention_cases import Case
from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from emu.test_attention_sm90 import tiles
from fastgpt.ops import reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

SCHEDULE = "attention_schedule.cuh"
BUGS = [
    Bug("plan: shortest first", SCHEDULE, "kPlanThreads - 1 - (steps >> shift)", "steps >> shift", expression=True),
    Bug("plan: no barrier before the sums", SCHEDULE, "__syncthreads();  // counted", ";"),
    Bug("plan: no barrier between read and write", SCHEDULE, "__syncthreads();  // read by all", ";"),
    Bug("plan: no barrier before the list", SCHEDULE, "__syncthreads();  // where each length begins", ";"),
    Bug("plan: offsets taken as they are", SCHEDULE, "x < least ? least : x > most ? most : x", "x", expression=True),
    Bug("plan: a list past its room", SCHEDULE, "at < room", "true", expression=True),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("attention_sm90", BUGS)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (5, 11), (11, 5)])
def test_ranges_are_the_rows_that_see_each_other(emulator: Emulator, queries: int, keys: int) -> None:
    limits = (-1, 0, 1, 3, 20)
    for left, right, causal in itertools.product(limits, limits, (False, True)):
        seen = reference.visible(queries, keys, causal, left, right, None, None, torch.device("cpu"))
        for begin, end in itertools.combinations(range(12), 2):
            found = torch.full((4,), -1)
            emulator("ranges", found, queries, keys, left, right, int(causal), begin, end)
            ranges = found.tolist()
            for (first, stop), sees in zip((ranges[:2], ranges[2:]), (seen, seen.T), strict=True):
                right_ones = sees[begin:end].any(0).nonzero().flatten().tolist()
                assert list(range(first, stop)) == right_ones, (left, right, causal, begin, end)


LENGTHS = [
    ((300, 300), (1, 1), (128, 128), (0, 0), (129, 129), (700, 700)),
    ((5, 900), (900, 5), (0, 40), (40, 0), (256, 384)),
    tuple((n % 7, n % 5) for n in range(70)),
    ((70_000, 70_000), (64_000, 200)),
]


def check_plan(
    emulator: Emulator,
    lengths: tuple[tuple[int, int], ...],
    keys_first: bool,
    causal: bool,
    mode: tuple[str, str] = MODES[0],
    bug: str | None = None,
) -> None:
    """Each tile once, ordered by the steps that its rows' masks leave, counted here one by one."""
    case = Case(sum(q for q, _ in lengths), sum(k for _, k in lengths), causal=causal, lengths=lengths)
    room = tiles(case.keys if keys_first else case.queries, len(lengths))
    plan = torch.full((room,), -7, dtype=torch.int32)
    sizes = (len(lengths), case.queries, case.keys, int(causal), int(keys_first))
    emulator("plan", plan, *case.offsets, *sizes, mode=mode, seed=3, bug=bug)
    count = int(plan[0])
    order = [tuple(entry) for entry in plan[2 : 2 + 2 * count].reshape(-1, 2).tolist()]
    assert sorted(order) == sorted(
        (block, s)
        for s, (queries, keys) in enumerate(lengths)
        for block in range(-(-(keys if keys_first else queries) // 128))
    )
    steps = []
    for block, s in order:
        queries, keys = lengths[s]
        if keys_first:  # the first query that sees the block's first key, to the last
            begin, end = max(0, 128 * block - (keys - queries)) if causal else 0, queries
        else:
            begin, end = 0, max(0, min(keys, min(128 * block + 128, queries) + keys - queries)) if causal else keys
        steps.append(-(-end // 64) - begin // 64 if end > begin else 0)
    shift = 0
    while max(steps) >> shift >= 1024:
        shift += 1
    places = [n >> shift for n in steps]
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=range(len(LENGTHS)))
@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_plan_of_packed_sequences(
    emulator: Emulator, lengths: tuple[tuple[int, int], ...], keys_first: bool, causal: bool
) -> None:
    for mode in (MODES[0], ("warp priority", "random")):
        check_plan(emulator, lengths, keys_first, causal, mode)


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_of_the_plan_are_caught(emulator: Emulator, bug: str) -> None:
    for mode in [MODES[0], ("random", "eager"), ("warp priority", "eager")]:
        try:
            check_plan(emulator, LENGTHS[0], False, True, mode, bug)
            check_offsets(emulator, mode, bug)
        except (EmulationError, AssertionError):
            return
    pytest.fail("no mode saw it")


def test_offsets_outside_of_the_tensors_are_kept_within(emulator: Emulator) -> None:
    check_offsets(emulator)


def check_offsets(emulator: Emulator, mode: tuple[str, str] = MODES[0], bug: str | None = None) -> None:
    """Offsets that overlap, fall and leave the tensors: nothing outside of memory is touched."""
    q = torch.randn(1, 520, 1, 64).bfloat16()
    out, lse = torch.zeros_like(q), torch.zeros(1, 1, 520)
    offsets = torch.tensor([-50, 3000, 0, 3000, 0, 3000], dtype=torch.int32)
    plan = torch.zeros(tiles(520, 5), dtype=torch.int32)
    sizes = (1, 1, 1, 520, 520, 64, 1, 0.125)
    emulator(
        "attention_fwd_bf16",
        q,
        q,
        q,
        out,
        lse,
        *sizes,
        2,
        -1,
        -1,
        offsets,
        offsets,
        5,
        plan,
        None,
        0,
        1.0,
        mode=mode,
        bug=bug,
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("blocks", "heads", "batch", "kilobytes", "group"),
    [(1, 1, 1, 1, 1), (8, 12, 4, 256, 1), (5, 6, 3, 16384, 2), (7, 8, 1, 8000, 4), (3, 5, 2, 1 << 20, 1)],
)
def test_the_schedule_takes_each_tile_once_and_long_ones_first(
    emulator: Emulator, blocks: int, heads: int, batch: int, kilobytes: int, group: int
) -> None:
    tiles = torch.full((blocks * heads * batch, 3), -1)
    emulator("schedule", tiles, blocks, heads, batch, kilobytes << 10, group, 1)
    rising = tiles.clone()
    emulator("schedule", tiles, blocks, heads, batch, kilobytes << 10, group, 0)
    rising[:, 0] = blocks - 1 - rising[:, 0]
    assert torch.equal(rising, tiles)
    order = [tuple(row) for row in tiles.tolist()]
    assert sorted(order) == list(itertools.product(range(blocks), range(heads), range(batch)))
    section = min(heads * batch, max(group, (32 << 10) // kilobytes * group))
    together = [order[i : i + section * blocks] for i in range(0, len(order), section * blocks)]
    for tiles_of_section in together:
        lengths = [block for block, _, _ in tiles_of_section]
        assert lengths == sorted(lengths, reverse=True)
        assert len({(head, b) for _, head, b in tiles_of_section}) <= section
