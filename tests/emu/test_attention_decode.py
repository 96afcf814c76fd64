"""csrc/cuda/attention_decode.cuh on the emulator, called as fastgpt/ops/cuda_attention.py calls the module."""

from typing import Any

import pytest
import torch
from parity import assert_parity, random
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emu.build import Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from fastgpt.ops import cuda, cuda_attention, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

KERNEL = "attention_decode.cuh"
SEEN = "j < end && j <= last[r]"
BUGS = [
    Bug("warps not waited for", KERNEL, "__syncthreads();  // every warp's sums are there", ";"),
    Bug("mask off by one", KERNEL, SEEN, "j < end && j <= last[r] + 1", expression=True),
    Bug("keys past the part", KERNEL, SEEN, "j <= last[r]", expression=True),
    Bug("diagonal of the square", KERNEL, "i + offset", "i", expression=True),
    Bug("sums not rescaled", KERNEL, "sums[r][e] *= shrink;", ";"),
    Bug("total not rescaled", KERNEL, "total[r] *= shrink;", ";"),
    Bug("groups not merged", KERNEL, "bits < 32", "bits < 16", expression=True),
    Bug("half of the dot product", KERNEL, "kLanes / 2", "kLanes / 4", expression=True),
    Bug("wrong key head", KERNEL, "blockIdx.y % p.kv_heads", "blockIdx.y / p.kv_heads", expression=True),
    Bug("rows that see nothing", KERNEL, "of_all == -INFINITY ? 0.0f : of_all", "of_all", expression=True),
    Bug("parts unweighted", KERNEL, "whole += decode_factor(d.part_lse[s * rows + row], m);", "whole += 1.0f;"),
    Bug("parts of another row", KERNEL, "(s * rows + row) * p.dim", "(s + row * d.splits) * p.dim", expression=True),
]
#        B  H Hkv Tq   Tk    D  causal
CASES = [
    (1, 1, 1, 1, 1, 64, True),
    (2, 4, 2, 1, 97, 64, False),
    (1, 2, 2, 3, 1025, 64, True),
    (1, 8, 1, 1, 600, 128, True),
    (2, 3, 3, 1, 113, 32, False),
    (1, 10, 1, 1, 300, 96, True),
    (1, 2, 1, 5, 3, 64, True),  # two queries see nothing
]
BROKEN = [(1, 4, 2, 3, 330, 64, True), (1, 2, 1, 5, 3, 64, True), (2, 3, 3, 1, 700, 64, False)]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("attention_decode", BUGS)


def run(
    emulator: Emulator,
    case: tuple[int, int, int, int, int, int, bool],
    dtype: torch.dtype = torch.bfloat16,
    multiprocessors: int = 2,
    parts: tuple[int, int] | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """The op on the emulator, held to the tolerance rule."""
    batch, heads, kv_heads, queries, keys, dim, causal = case
    launched = []

    def launch(name: str, device: torch.device, *args: Any) -> None:
        flat: list[Any] = []
        for arg in args:
            flat.extend(arg if isinstance(arg, tuple) else [arg])
        launched.append(name)
        emulator(name, *(int(x) if isinstance(x, bool) else x for x in flat), **how)

    q = random(batch, queries, heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    k, v = (random(batch, kv_heads, keys, 2 * dim, dtype=dtype, seed=s)[..., :dim] for s in (2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_launch", launch)
        patch.setattr(cuda, "_check", lambda *_: None)
        patch.setattr(cuda_attention, "_capability", lambda _: (9, 0))
        patch.setattr(cuda_attention, "_multiprocessors", lambda _: multiprocessors)
        if parts is not None:
            patch.setattr(cuda_attention, "decode_splits", lambda *_: parts)
        out, lse = cuda_attention._attention(q, k, v, causal, 0.2)
    assert launched == ["attention_decode"]
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), causal, 0.2)
    mask = reference.causal_mask(queries, keys, q.device) if causal else None
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.2)
    theirs = theirs if mask is None else torch.where(mask.any(-1)[:, None], theirs, 0.0)
    assert_parity(out, theirs.to(dtype), exact, "out")
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_decode(emulator: Emulator, case: Any, dtype: torch.dtype) -> None:
    run(emulator, case, dtype)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_every_mode_gives_the_same_bits(emulator: Emulator, mode: tuple[str, str]) -> None:
    for first, again in zip(run(emulator, BROKEN[0]), run(emulator, BROKEN[0], mode=mode, seed=3), strict=True):
        assert torch.equal(first, again)


def test_parts_of_any_length(emulator: Emulator) -> None:
    run(emulator, BROKEN[0], parts=(7, 50))


def test_one_part_and_many_agree(emulator: Emulator) -> None:
    one, many = (run(emulator, CASES[2], torch.float32, count) for count in (1, 100))
    torch.testing.assert_close(one[0], many[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bug", [bug.name for bug in BUGS])
def test_planted_bugs_are_caught(emulator: Emulator, bug: str) -> None:
    for mode in [MODES[0], ("random", "eager"), ("warp priority", "eager")]:
        for case in BROKEN:
            try:
                run(emulator, case, mode=mode, seed=3, bug=bug)
                run(emulator, BROKEN[0], parts=(7, 50), mode=mode, seed=3, bug=bug)
            except (EmulationError, AssertionError):
                return
    pytest.fail("no mode saw it")


@pytest.mark.parametrize("keys", [1, 255, 256, 257, 4096, 100_000])
@pytest.mark.parametrize("blocks", [1, 12, 96, 1000])
def test_the_parts_cover_the_keys_and_fill_the_device(keys: int, blocks: int) -> None:
    splits, part = cuda_attention.decode_splits(keys, blocks, 132)
    assert (splits - 1) * part < keys <= splits * part
    assert part % 64 == 0
    assert splits == 1 or part >= 256
    assert part <= 256 or splits * blocks <= 2 * 4 * 132 + blocks
    assert part == 256 or splits * blocks >= 132 or keys <= part  # as many parts as there is work for


def sanitized(emulator: Emulator, sanitizer: str, bug: str | None = None) -> None:
    """Three rows of a key head against 200 keys in two parts, with the tensors themselves in the place of addresses."""
    q, k, v = (
        random(1, heads, time, 64, dtype=torch.bfloat16, seed=heads) for heads, time in ((3, 1), (1, 200), (1, 200))
    )
    out, lse = torch.zeros_like(q), torch.zeros(1, 3, 1)
    part, part_lse = torch.zeros(2, 3, 64), torch.zeros(2, 3)
    places = [value for x in (q, k, v, out) for value in (x, *x.stride()[:3])]
    arguments = (1, *places, lse, 1, 3, 1, 1, 200, 64, 0.2, 1, 2, 128, part, part_lse)
    emulator.sanitized(sanitizer, "attention_decode", *arguments, bug=bug)
    exact, _ = reference.attention(q.double(), k.double(), v.double(), True, 0.2)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_sanitizer_reports(emulator: Emulator, sanitizer: str) -> None:
    sanitized(emulator, sanitizer)


def test_thread_sanitizer_finds_a_missing_barrier(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match="data race"):
        sanitized(emulator, "thread", bug="warps not waited for")
