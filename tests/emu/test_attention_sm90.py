"""csrc/cuda/attention_sm90.cuh on the emulator: tensor copies, mbarriers, wgmma, warpgroups that take turns."""

import itertools

import pytest
import torch
from torch import Tensor

from emu import attention_cases
from emu.attention_cases import Case
from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from fastgpt.ops import reference
from fastgpt.ops.dropout import threshold

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

KERNEL, HOPPER, BACKWARD = "attention_sm90.cuh", "hopper.cuh", "attention_sm90_backward.cuh"
MASK, DROPOUTS = "attention_mask.cuh", "attention_dropout.cuh"
K_FREE = "ptx::mbarrier_wait(memory.key_empty(place.stage), place.parity ^ 1);"
SCORES = (
    "ptx::wgmma_wait<1>();  // the scores\n        ptx::keep(scores);\n        release(memory.key_empty(place.stage));"
)
SUMS = "ptx::wgmma_wait<0>();  // the sums\n        ptx::keep(out);\n        release(memory.value_empty(behind.stage));"
G_SUMS = "ptx::wgmma_wait<0>();  // the sums"
TWICE = "if (lane == 1) ptx::mbarrier_arrive(empty(place.stage)); ptx::wgmma_wait<0>();"
EXPECT = "ptx::mbarrier_arrive_expect(full(place.stage), 2 * Shape::kColumnsBytes);"
COUNT = "ptx::mbarrier_init(memory.key_empty(stage), 4 * Shape::kConsumers);"
V_THERE = "ptx::mbarrier_wait(memory.value_full(behind.stage), behind.parity);\n        ptx::named_barrier_sync(my_turn, 256);"
GIVE_TURN = "ptx::wgmma_commit();\n        ptx::named_barrier_arrive(other_turn, 256);"
FIRST_TURN = "if (consumer == 1) ptx::named_barrier_arrive(other_turn, 256);"
PACK = "w[k][r] = ptx::pack<T>(d[8 * k + 2 * r], d[8 * k + 2 * r + 1]);"
K_MAJOR = "return descriptor(panel + row * kPanelRowBytes + column % kPanelColumns * 2, 16, kGroupBytes);"
MN_MAJOR = "return descriptor(panel + row * kPanelRowBytes, tile_rows * kPanelRowBytes, kGroupBytes);"
BUGS = [
    Bug("no sync after the barriers", KERNEL, "__syncthreads();  // the barriers are there", ";"),
    Bug("no fence after the barriers", KERNEL, "ptx::fence_mbarrier_init();", ";"),
    Bug("expects too few bytes", KERNEL, "rows * kDim * 2", "rows * kDim", expression=True),
    Bug("waits for the wrong parity of K", KERNEL, K_FREE, K_FREE.replace(" ^ 1", "")),
    Bug("does not wait for K to be free", KERNEL, K_FREE, ";"),
    Bug("does not wait for V to be free", KERNEL, K_FREE.replace("key", "value"), ";"),
    Bug("does not wait for Q to be free", KERNEL, "ptx::mbarrier_wait(memory.query_empty(), query_parity ^ 1);", ";"),
    Bug("does not wait for V", KERNEL, V_THERE, "ptx::named_barrier_sync(my_turn, 256);"),
    Bug("one consumer frees the stage", KERNEL, COUNT, COUNT.replace(" * Shape::kConsumers", "")),
    Bug(
        "too many must free the stage",
        KERNEL,
        COUNT.replace("key", "value"),
        "ptx::mbarrier_init(memory.value_empty(stage), 9);",
    ),
    Bug("scores read too early", KERNEL, SCORES, SCORES.replace("<1>", "<2>")),
    Bug("sums read too early", KERNEL, SUMS, SUMS.replace("<0>", "<1>")),
    Bug(
        "V freed before its product is done",
        KERNEL,
        SUMS,
        "release(memory.value_empty(behind.stage)); ptx::wgmma_wait<0>();",
    ),
    Bug("last sums never waited for", KERNEL, "ptx::wgmma_wait<0>();  // the last sums", ";"),
    Bug("no fence", KERNEL, "ptx::wgmma_fence();  // of the loop", ";"),
    Bug("turns are not given back", KERNEL, GIVE_TURN, "ptx::wgmma_commit();"),
    Bug("a turn of the wrong size", KERNEL, FIRST_TURN, FIRST_TURN.replace("256", "384")),
    Bug("the last turn is left", KERNEL, "if (consumer == 0) ptx::named_barrier_sync(my_turn, 256);", ";"),
    Bug("mask off by one", MASK, "column >= seen.end", "column > seen.end", expression=True),
    Bug("sums not rescaled", KERNEL, "out[i] *= shrink[i / 2 % 2];", ";"),
    Bug("rescaled by the other row", KERNEL, "out[i] *= shrink[i / 2 % 2];", "out[i] *= shrink[i % 2];"),
    Bug("wrong group stride", HOPPER, K_MAJOR, K_MAJOR.replace("kGroupBytes", "512")),
    Bug("K does not advance", HOPPER, K_MAJOR, K_MAJOR.replace("column % kPanelColumns * 2", "0")),
    Bug("V does not advance", HOPPER, MN_MAJOR, MN_MAJOR.replace("panel + row * kPanelRowBytes", "panel")),
    Bug("panels in the wrong place", HOPPER, MN_MAJOR, MN_MAJOR.replace("tile_rows *", "8 *")),
    Bug("weights in the wrong registers", HOPPER, PACK, PACK.replace("r + 1", "r")),
    Bug("no swizzle", HOPPER, "uint64_t{1} << 62", "uint64_t{0} << 62", expression=True),
    Bug("gradients: no sync after the barriers", BACKWARD, "__syncthreads();  // the barriers are there", ";"),
    Bug("gradients: too few bytes", BACKWARD, EXPECT, EXPECT.replace("2 *", "1 *")),
    Bug("gradients: stage not waited for", BACKWARD, "ptx::mbarrier_wait(full(place.stage), place.parity);", ";"),
    Bug("gradients: lse not waited for", BACKWARD, "kKeys ? 33 : 1", "1", expression=True),
    Bug("gradients: scores read too early", BACKWARD, "ptx::wgmma_wait<1>();  // the scores", "ptx::wgmma_wait<2>();"),
    Bug("gradients: dP read too early", BACKWARD, "ptx::wgmma_wait<0>();  // dP", "ptx::wgmma_wait<1>();"),
    Bug("gradients: no fence before the sums", BACKWARD, "ptx::wgmma_fence();  // before the sums", ";"),
    Bug("gradients: stage freed twice", BACKWARD, G_SUMS, TWICE),
    Bug("gradients: delta left out", BACKWARD, "kKeys ? delta[column] : row_delta[i / 2 % 2]", "0.0f", expression=True),
    Bug("the other row's mask", MASK, "i / 2 % 2 ? lower : upper", "i % 2 ? lower : upper", expression=True),
    Bug(
        "gradients: queries left out",
        MASK,
        "rows.begin - offset - right",
        "rows.begin - offset - right + 64",
        expression=True,
    ),
    Bug("gradients: one head of the group", BACKWARD, "width * group", "width", expression=True),
    Bug("window: left edge off by one", MASK, "column < seen.begin", "column + 1 < seen.begin", expression=True),
    Bug(
        "window: first keys never loaded",
        MASK,
        "range.begin / kStep",
        "(range.begin + kStep - 1) / kStep",
        expression=True,
    ),
    Bug("window: edge blocks unmasked", MASK, "columns.begin >= rows.end - 1 + offset - left", "true", expression=True),
    Bug("window: last queries left out", MASK, "last + left + 1", "last + left", expression=True),
    Bug("packed: the wrong rows of Q", KERNEL, "s.first_query + first_query", "first_query", expression=True),
    Bug("packed: the wrong rows of lse", KERNEL, "s.first_query + row + 8 * half", "row + 8 * half", expression=True),
    Bug(
        "packed: gradients from the wrong rows",
        BACKWARD,
        "(kKeys ? s.first_query : s.first_key) + at.first",
        "at.first",
        expression=True,
    ),
    Bug(
        "packed: the next sequence's lse",
        BACKWARD,
        "column < s.queries ? p.lse[from + column] * kLog2E : INFINITY",
        "p.lse[from + column] * kLog2E",
        expression=True,
    ),
    Bug(
        "dropout: the mask of another head",
        DROPOUTS,
        "static_cast<int64_t>(s.batch) * p.heads + head",
        "static_cast<int64_t>(s.batch) * p.heads",
        expression=True,
    ),
    Bug(
        "dropout: two lanes' words exchanged",
        DROPOUTS,
        "(lane & ~12) | c << 2",
        "(lane & ~12) | (c ^ 1) << 2",
        expression=True,
    ),
    Bug("dropout: the lower row's bits", DROPOUTS, "lane | 1", "lane", expression=True),
    Bug("dropout: four to a counter everywhere", DROPOUTS, "!d.aligned", "false", expression=True),
    Bug("dropout: the factor left out", KERNEL, "(kDropout ? p.keep_factor : 1.0f)", "1.0f", expression=True),
    Bug("dropout: dP without the factor", BACKWARD, "drop(ds, kept, p.keep_factor);", "drop(ds, kept, 1.0f);"),
    Bug("dropout: dV of what is dropped", BACKWARD, "drop(scores, kept, 1.0f);", ";"),
    Bug("O is not sent to the async proxy", KERNEL, "ptx::fence_proxy_async();  // of O", ";"),
    Bug("O's part is overwritten while it is read", KERNEL, "if (lane == 0) ptx::bulk_wait_read<0>();", ";"),
    Bug("O is in no group", KERNEL, "ptx::bulk_commit();", ";"),
    Bug("the block ends while it stores", KERNEL, "if (lane == 0) ptx::bulk_wait<0>();", ";"),
    Bug(
        "packed: O over the next sequence's",
        KERNEL,
        "first_query + warp_row + 16 <= s.queries",
        "true",
        expression=True,
    ),
    Bug("registers that are not there", KERNEL, "ptx::registers_decrease<Shape::kProducerRegisters>();", ";"),
]
ORDER_BUGS = [  # right values in the emulation: a warp meets at stmatrix
    Bug("O is stored before it is written", KERNEL, "__syncwarp();              // written", ";"),
]
CASES = [
    Case(128, 128),
    Case(1, 1),
    Case(97, 113, causal=True),
    Case(113, 97, causal=True),
    Case(300, 300, causal=True),
    Case(200, 257, causal=True, heads=4, kv_heads=2, batch=2),
    Case(130, 700),
    Case(97, 130, 128),
    Case(260, 390, 128, causal=True, heads=2, kv_heads=1),
    Case(150, 150, causal=True, dtype=torch.float16, magnitude=3.0),
    Case(17, 1025, 128, causal=True, dtype=torch.float16),
]
WINDOWS = [
    Case(300, 300, causal=True, window=(40, -1)),
    Case(260, 390, 128, causal=True, heads=2, kv_heads=1, window=(129, 0)),
    Case(97, 500, window=(30, 17)),
    Case(500, 97, window=(64, 63), heads=2),
    Case(300, 300, window=(-1, 100), dtype=torch.float16),
    Case(130, 700, 128, window=(0, 0)),
    Case(200, 200, window=(150, -1)),
]
PACKED = [
    Case(300, 300, causal=True, lengths=((130, 130), (1, 1), (0, 0), (169, 169)), heads=2),
    Case(210, 400, 128, causal=True, lengths=((100, 37), (10, 200), (100, 163)), heads=2, kv_heads=1),
    Case(260, 390, lengths=((60, 260), (200, 130)), dtype=torch.float16),
    Case(400, 400, causal=True, window=(50, -1), lengths=((129, 129), (271, 271))),
]
DROPOUT = [
    Case(130, 200, causal=True, batch=2, heads=4, kv_heads=2, dropout=0.2),
    Case(97, 113, causal=True, heads=2, dropout=0.5),  # rows of weights begin anywhere
    Case(150, 260, 128, heads=2, kv_heads=1, dropout=0.1, dtype=torch.float16),
    Case(140, 200, causal=True, window=(60, -1), lengths=((70, 101), (70, 99)), dropout=0.3),
]
BROKEN = {  # by the first word of a bug's name
    "": [Case(260, 390, 128, causal=True, heads=2, kv_heads=1), Case(140, 800, heads=2, kv_heads=1)],
    "window": [Case(300, 500, window=(64, 63), heads=2)],
    "dropout": [Case(100, 140, heads=2, kv_heads=1, batch=2, dropout=0.5), Case(70, 77, dropout=0.5)],
    "packed": [Case(200, 330, causal=True, lengths=((70, 130), (130, 200)), heads=2, kv_heads=1)],
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("attention_sm90", BUGS + ORDER_BUGS)


def tiles(rows: int, sequences: int) -> int:
    """Numbers that the list of tiles of packed sequences takes."""
    return 2 + 2 * (rows // 128 + sequences)


def scratch(case: Case) -> Tensor | None:
    """Memory for the plans of packed sequences."""
    numbers = tiles(case.queries, len(case.lengths)) + tiles(case.keys, len(case.lengths))
    return torch.full((numbers,), -7, dtype=torch.int32) if case.lengths else None


def sums(emulator: Emulator, case: Case) -> Tensor:
    """Zeros to which the backward with five products adds dQ."""
    numbers = torch.zeros(1, dtype=torch.int64)
    emulator("sums", numbers, case.batch, case.heads, case.queries, case.dim, len(case.lengths))
    return torch.zeros(int(numbers))


def dropping(case: Case) -> tuple[Tensor | None, int, float]:
    """The seed, the threshold and the factor of what is kept."""
    return case.seed, threshold(case.dropout), 1 / (1 - case.dropout)


def check(
    emulator: Emulator,
    case: Case,
    multiprocessors: int = 2,
    fast: bool = False,
    **how: "str | int | tuple[str, str]",
) -> list[Tensor]:
    more = (multiprocessors, *case.window, *case.offsets, len(case.lengths), scratch(case), *dropping(case))
    return attention_cases.check(
        emulator, case, more=more, more_backward=(sums(emulator, case),) if fast else (), **how
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(emulator: Emulator, case: Case) -> None:
    check(emulator, case)


@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(emulator: Emulator, case: Case) -> None:
    check(emulator, case, mode=("warp priority", "random"))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences(emulator: Emulator, case: Case) -> None:
    check(emulator, case, mode=("random", "random"))


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout(emulator: Emulator, case: Case) -> None:
    check(emulator, case, mode=("random", "lazy"))


@pytest.mark.parametrize("case", [Case(97, 132, heads=2, batch=2, dropout=0.4), Case(60, 190, heads=2, dropout=0.1)])
def test_the_mask_is_that_of_the_other_engines(emulator: Emulator, case: Case) -> None:
    q, k = case.tensor(case.heads, case.queries, 1), case.tensor(case.heads, case.keys, 2)
    lse = torch.full((case.batch, case.heads, case.queries), float("nan"))
    sizes = (case.batch, case.heads, case.heads, case.queries, case.keys, 64, 0, 0.1)
    weights = []
    for first in range(0, case.keys, 64):  # values that are a part of the identity give back the weights
        v = torch.eye(case.keys).bfloat16()[:, first : first + 64]
        v = torch.nn.functional.pad(v, (0, 64 - v.shape[1]))[None, :, None].repeat(case.batch, 1, case.heads, 1)
        out = torch.full_like(q, float("nan"))
        emulator("attention_fwd_bf16", q, k, v, out, lse, *sizes, 2, -1, -1, None, None, 0, None, *dropping(case))
        weights.append(out.transpose(1, 2))
    kept = torch.cat(weights, -1)[..., : case.keys] != 0
    assert torch.equal(kept, reference.dropout_mask(kept.shape, case.seed, case.dropout).bool())


def test_a_window_reads_its_own_keys_alone(emulator: Emulator) -> None:
    q, k, v = (torch.randn(1, 128, 1, 64).bfloat16() for _ in range(3))
    far = torch.full((1, 1280, 1, 64), float("nan"), dtype=torch.bfloat16)
    k, v = (torch.cat([far, x], dim=1) for x in (k, v))
    out, lse = torch.full_like(q, float("nan")), torch.full((1, 1, 128), float("nan"))
    emulator(
        "attention_fwd_bf16",
        q,
        k,
        v,
        out,
        lse,
        1,
        1,
        1,
        128,
        1408,
        64,
        1,
        0.125,
        1,
        0,
        -1,
        None,
        None,
        0,
        None,
        None,
        0,
        1.0,
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str], dim: int) -> None:
    case = Case(150, 400, dim, causal=True)
    for first, again in zip(check(emulator, case), check(emulator, case, mode=mode, seed=5), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("multiprocessors", [1, 3, 100])
def test_any_grid_gives_the_same_bits(emulator: Emulator, multiprocessors: int) -> None:
    case = Case(300, 300, causal=True, heads=2)
    for first, again in zip(check(emulator, case), check(emulator, case, multiprocessors), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    for seed, case in itertools.product(range(2), BROKEN.get(bug.partition(":")[0], BROKEN[""])):
        for mode in [MODES[0], ("random", "lazy"), ("warp priority", "random"), ("warp priority", "eager")]:
            try:
                check(emulator, case, mode=mode, seed=seed, bug=bug, multiprocessors=1)
            except (EmulationError, AssertionError):
                return
    pytest.fail("no mode saw it")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_sanitizer_reports(emulator: Emulator, sanitizer: str) -> None:
    check(emulator, Case(150, 300, causal=True), sanitizer=sanitizer)


@pytest.mark.parametrize("bug", [bug.name for bug in ORDER_BUGS])
def test_missing_order_is_seen_by_threadsanitizer(emulator: Emulator, bug: str) -> None:
    with pytest.raises(EmulationError, match="data race"):
        check(emulator, Case(60, 60), sanitizer="thread", bug=bug)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(8, 8, 96), "head_dim: expected 64 or 128, got 96"),
        (Case(8, 8, heads=3, kv_heads=2), "heads a multiple of kv_heads"),
    ],
)
def test_what_is_not_covered_raises(emulator: Emulator, case: Case, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        check(emulator, case)
