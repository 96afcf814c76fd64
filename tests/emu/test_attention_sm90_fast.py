"""The backward with five products of attention_sm90 on the emulator: dS through shared memory, dQ by bulk reductions."""

import dataclasses
import itertools

import pytest
import torch

from emu.attention_cases import Case
from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from emu.test_attention_sm90 import DROPOUT, PACKED, WINDOWS, check

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

BACKWARD, HOPPER, MASK, PIECES = (
    "attention_sm90_backward.cuh", "hopper.cuh", "attention_mask.cuh", "attention_sm90_grad_query.cuh"
)  # fmt: skip
BUGS = [
    Bug("dS is not sent to the async proxy", BACKWARD, "ptx::fence_proxy_async();  // of dS", ";"),
    Bug("dQ is not sent to the async proxy", BACKWARD, "ptx::fence_proxy_async();                   // of dQ", ";"),
    Bug("dS of the other consumer is not waited for", BACKWARD, "ptx::named_barrier_sync(1, 256);", ";"),
    Bug("one tile of dS", BACKWARD, "step % 2 * Shape::kScoresBytes", "0", expression=True),
    Bug("dQ's piece is overwritten while it is read", BACKWARD, "if (thread == 0) ptx::bulk_wait_read<0>();", ";"),
    Bug("dQ's piece is written before it is free", BACKWARD, "ptx::named_barrier_sync(barrier + 1, 128);  // free", ";"),
    Bug("dQ is added before it is written", BACKWARD, "ptx::named_barrier_sync(barrier + 1, 128);  // written", ";"),
    Bug("the addition is in no group", BACKWARD, "ptx::bulk_commit();", ";"),
    Bug("the block ends while it adds", BACKWARD, "if (kAll && threadIdx.x % 128 == 0) ptx::bulk_wait<0>();", ";"),
    Bug("both consumers make the same columns", BACKWARD, "(warpgroup - 1) * (kDim / 2)", "0", expression=True),
    Bug("dQ of the wrong queries", BACKWARD, "first / kSumRows", "0", expression=True),
    Bug("dS without the swizzle", HOPPER, "(2 * (first + k) + lane / 16) ^ mine % 8", "2 * (first + k) + lane / 16", expression=True),
    Bug("A does not advance", HOPPER, "mn_major(a, kInner, 16 * k)", "mn_major(a, kInner, 0)", expression=True),
    Bug("keys of the next sequence add to dQ", MASK, "if (rows.begin >= keys) return {0, 0};", ";"),
    Bug("pieces overlap", PIECES, "s.first_query / kSumRows + sequence", "s.first_query / kSumRows", expression=True),
]  # fmt: skip
CASES = [
    Case(128, 128),
    Case(1, 1),
    Case(113, 97, causal=True),
    Case(200, 257, causal=True, heads=4, kv_heads=2, batch=2),
    Case(97, 130, 128),
    Case(260, 390, 128, causal=True, heads=2, kv_heads=1),
    Case(150, 150, causal=True, dtype=torch.float16, magnitude=3.0),
    *(WINDOWS[i] for i in (1, 3)),
    *PACKED,
    *(DROPOUT[i] for i in (0, 2, 3)),
]
BROKEN = [
    Case(200, 300, 128, causal=True, heads=2, kv_heads=1),
    Case(200, 330, causal=True, lengths=((70, 130), (130, 200)), heads=2, kv_heads=1),
    Case(200, 330, lengths=((70, 130), (130, 200))),
]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("attention_sm90", BUGS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(emulator: Emulator, case: Case) -> None:
    check(emulator, case, fast=True)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_mode(emulator: Emulator, mode: tuple[str, str], dim: int) -> None:
    check(emulator, Case(150, 300, dim, causal=True), fast=True, mode=mode, seed=5)


def test_dk_and_dv_are_those_of_the_deterministic_kernels(emulator: Emulator) -> None:
    case = Case(200, 330, causal=True, heads=2, kv_heads=1, dropout=0.2)
    one, other = check(emulator, case), check(emulator, case, fast=True, mode=("warp priority", "random"))
    assert all(torch.equal(a, b) for a, b in zip(one[3:], other[3:], strict=True))


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    for seed, case in itertools.product(range(2), BROKEN):
        for mode in [MODES[0], ("random", "lazy"), ("warp priority", "random"), ("warp priority", "eager")]:
            try:
                check(emulator, case, fast=True, mode=mode, seed=seed, bug=bug)
            except (EmulationError, AssertionError):
                return
    pytest.fail("no mode saw it")


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_sanitizer_reports(emulator: Emulator, sanitizer: str) -> None:
    check(emulator, dataclasses.replace(BROKEN[1], lengths=(), heads=1), fast=True, sanitizer=sanitizer)
