"""Bias and activation, AdamW, the gradients' norm, embedding and rope on the emulator, through their wrappers, and planted bugs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity import assert_parity, random

from emu.build import KERNELS, Bug, compiler
from emu.emulator import MODES, EmulationError, Emulator
from emu.engine import implementation, on_emulator
from fastgpt.ops import backend, cuda_adamw, reference
from fastgpt.ops.bias_activation import KINDS

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [F32, BF16, F16]
BUGS = {
    "bias": [
        Bug("columns past the end", "bias_activation_launch.cuh", "a.cols * int64_t(sizeof(T))", "16", expression=True),
        Bug("the first row's gradient alone", "bias_activation.cuh", "sum.v[e] += dx;", "sum.v[e] = dx;"),
        Bug(
            "the bias left out",
            "bias_activation.cuh",
            "to_float(v.v[e]) + to_float(raw.v[e])",
            "to_float(v.v[e])",
            expression=True,
        ),
    ],
    "adamw": [
        Bug(
            "bisection off by one",
            "adamw.cuh",
            "list.first_chunk[middle] <= chunk",
            "list.first_chunk[middle] < chunk",
            expression=True,
        ),
        Bug("no zero", "adamw.cuh", "if (a.zero_grads) store<kElements>(grads + i, g);", ";"),
        Bug(
            "the second moment's correction left out",
            "adamw.cuh",
            "sqrtf(v.v[e]) / a.root_correction",
            "sqrtf(v.v[e])",
            expression=True,
        ),
        Bug("alignment not looked at", "adamw.cuh", "all_aligned(tables, 5, tensor)", "true", expression=True),
        Bug("sums read too soon", "adamw.cuh", "__syncthreads();  // every warp's sum is there", ";"),
    ],
    "embedding": [
        Bug(
            "no look at the number before",
            "embedding.cuh",
            "first > 0 && a.ids[first - 1] == id",
            "false",
            expression=True,
        ),
        Bug(
            "an id outside",
            "embedding.cuh",
            "id < 0 || id >= a.rows || id == a.padding",
            "id < 0 || id == a.padding",
            expression=True,
        ),
        Bug(
            "the gradient before is lost",
            "embedding.cuh",
            "a.keep ? to_float(out.v[e]) + sum.v[e] : sum.v[e]",
            "sum.v[e]",
            expression=True,
        ),
    ],
    "rope": [
        Bug("the other way round", "rope.cuh", "a.inverse ? -s.v[e] : s.v[e]", "s.v[e]", expression=True),
        Bug("the rest not copied", "rope.cuh", "store<kElements>(y + column, load<kElements>(x + column));", ";"),
        Bug(
            "another head's stride",
            "rope.cuh",
            "head * a.x_stride[1]",
            "head * a.y_stride[1]",
            expression=True,
        ),
    ],
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator("memory", [bug for bugs in BUGS.values() for bug in bugs])


def check_bias(
    emulator: Emulator,
    kind: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    **run: Any,
) -> None:
    x, grad = random(rows, cols, dtype=dtype, scale=2.0), random(rows, cols, dtype=dtype, seed=1)
    bias = random(cols, dtype=bias_dtype or dtype, seed=2)
    with on_emulator(emulator, **run):
        y = implementation("bias_activation")(x, bias, kind)
        kept = y if kind in reference.KEEPS_RESULT else x
        back = implementation("bias_activation_backward")(grad, kept, bias, kind, True)
        assert implementation("bias_activation_backward")(grad, kept, bias, kind, False)[1].numel() == 0
    formula = reference.bias_activation_backward
    theirs, exact = (
        formula(grad, kept, bias, kind, True),
        formula(grad.double(), kept.double(), bias.double(), kind, True),
    )
    assert_parity(
        y, reference.bias_activation(x, bias, kind), reference.bias_activation(x.double(), bias.double(), kind), kind
    )
    for mine, torchs, right in zip(back, theirs, exact, strict=True):
        assert_parity(mine, torchs, right, f"{kind} gradient")


def check_adamw(
    emulator: Emulator,
    sizes: tuple[int, ...],
    *,
    shadow: torch.dtype | None = None,
    zero: bool = False,
    skip: int = 0,
    **run: Any,
) -> None:
    def tensors(seed: int) -> list[torch.Tensor]:
        return [random(size + skip, seed=seed + i)[skip:] for i, size in enumerate(sizes)]

    params, grads, exp_avgs = tensors(0), tensors(10), tensors(20)
    exp_avg_sqs = [x.abs() for x in tensors(30)]
    exp_avg_sqs = [torch.cat([x.new_zeros(skip), x])[skip:] for x in exp_avg_sqs]
    shadows = [torch.zeros(size + skip, dtype=shadow)[skip:] for size in sizes] if shadow else []
    decays = [0.1 * (i % 2) for i in range(len(sizes))]
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    step = (decays, 1e-2, 0.9, 0.95, 1e-8, 0.5, 3)
    theirs = [[x.clone() for x in tensors] for tensors in lists]
    exact = [[x.double() for x in tensors] for tensors in lists]
    with on_emulator(emulator, guarded=False, **run):
        norm = implementation("grad_norm")(grads)
        assert_parity(norm, reference.grad_norm(grads), reference.grad_norm([g.double() for g in grads]), "norm")
        implementation("adamw")(*lists, *step, shadows, zero)
    for results in (theirs, exact):
        reference.adamw(*results, *step, zero_grads=zero)
    for ours, torchs, right in zip(lists, theirs, exact, strict=True):
        for triple in zip(ours, torchs, right, strict=True):
            assert_parity(*triple, "adamw")
    for p, s in zip(params, shadows, strict=False):
        assert torch.equal(s, p.to(shadow))


def check_embedding(
    emulator: Emulator,
    count: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    into: torch.dtype | None = None,
    **run: Any,
) -> None:
    ids = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(0))
    ids[::3] = 1  # one number often
    weight, grad = random(rows, cols, dtype=dtype), random(count, cols, dtype=dtype, seed=1)
    before = random(rows, cols, dtype=into or dtype, seed=2)
    kept = before.clone()
    with on_emulator(emulator, **run):
        y = implementation("embedding")(ids.int(), weight, -1, False)
        dweight = implementation("embedding_backward")(grad, ids, rows, 2)
        implementation("embedding_accumulate_backward")(kept, grad, ids, 2)
        outside = implementation("embedding")(torch.tensor([0, rows, -1]), weight, -1, False)
        wrong = torch.tensor([rows, -1, 0] + [3] * (count - 3))
        alone = implementation("embedding_backward")(grad, wrong, rows, -1)
    assert torch.equal(y, weight[ids])
    assert outside.isnan().any(1).tolist() == outside.isnan().all(1).tolist() == [False, True, True]
    formula = reference.embedding_backward
    assert_parity(dweight, formula(grad, ids, rows, 2), formula(grad.double(), ids, rows, 2), "gradient")
    assert_parity(
        alone, formula(grad[2:], wrong[2:], rows, -1), formula(grad[2:].double(), wrong[2:], rows, -1), "ids outside"
    )
    theirs, exact = before.clone(), before.double()
    reference.embedding_accumulate(theirs, grad, ids, 2)
    reference.embedding_accumulate(exact, grad.double(), ids, 2)
    assert_parity(kept, theirs, exact, "accumulated")


def check_rope(
    emulator: Emulator,
    shape: tuple[int, int, int, int],
    pairs: int,
    dtype: torch.dtype,
    *,
    interleaved: bool,
    **run: Any,
) -> None:
    B, H, T, D = shape
    x = random(B, T, H, D, dtype=dtype).transpose(1, 2)
    angles = random(T, pairs, seed=1, scale=3.0)
    for inverse in (False, True):
        args = (x, angles.cos(), angles.sin(), interleaved, inverse)
        with on_emulator(emulator, guarded=False, **run):
            y = implementation("rope")(*args)
            other = implementation("rope")(x.contiguous(), *args[1:])
        wide = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)
        assert_parity(y, reference.rope(*args), reference.rope(*wide), "rope")
        assert torch.equal(y, other)
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_activation(emulator: Emulator, kind: str, dtype: torch.dtype) -> None:
    for rows, cols in ((3, 8), (5, 97), (2, 1032), (300, 16)):
        check_bias(emulator, kind, rows, cols, dtype)
    check_bias(emulator, kind, 5, 40, dtype, F32)


def test_bias_of_no_rows(emulator: Emulator) -> None:
    with on_emulator(emulator):
        assert implementation("bias_activation")(torch.empty(0, 8), random(8), "relu").shape == (0, 8)
        empty = torch.empty(0, 8)
        assert torch.equal(
            implementation("bias_activation_backward")(empty, empty, random(8), "relu", True)[1], torch.zeros(8)
        )
        for bias in (random(8).double(), random(8).half()):
            with pytest.raises(backend.NotCovered):
                implementation("bias_activation")(random(2, 8), bias, "relu")


@pytest.mark.parametrize("shadow", [None, BF16, F16], ids=str)
def test_adamw(emulator: Emulator, shadow: torch.dtype | None) -> None:
    check_adamw(emulator, (4096, 1, 97, 0, 8193, 113, 12288), shadow=shadow, zero=shadow is not None)
    check_adamw(emulator, (1025, 40), shadow=shadow, zero=True, skip=1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_norm_of_gradients(emulator: Emulator, dtype: torch.dtype) -> None:
    grads = [random(size, dtype=dtype, seed=size, scale=100.0) for size in (1, 97, 4096, 8197)]
    with on_emulator(emulator, guarded=False):
        norm = implementation("grad_norm")(grads)
        assert norm.dtype == torch.float64
        assert norm.device.type == "cpu"
        torch.testing.assert_close(norm, torch.cat(grads).double().norm(), rtol=1e-12, atol=0)
        assert implementation("grad_norm")([torch.full((5,), 1e30)]) > 1e30
        with pytest.raises(backend.NotCovered):
            implementation("grad_norm")([grads[0], random(3).double()])


def test_lists_are_made_once(emulator: Emulator) -> None:
    cuda_adamw._table.cache_clear()
    grads = [random(97), random(5)]
    with on_emulator(emulator, guarded=False):
        implementation("grad_norm")(grads)
        made = cuda_adamw._table.cache_info().misses
        implementation("grad_norm")(grads)
    assert cuda_adamw._table.cache_info().misses == made


def test_the_chunk_is_the_kernels() -> None:
    assert f"constexpr int kChunk = {cuda_adamw.CHUNK};" in (KERNELS / "kernels.cuh").read_text()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_embedding(emulator: Emulator, dtype: torch.dtype) -> None:
    for count, rows, cols in ((3, 7, 8), (113, 11, 97), (40, 1000, 1032), (25, 5, 64)):
        check_embedding(emulator, count, rows, cols, dtype)
    check_embedding(emulator, 30, 9, 24, dtype, into=F32)


def test_embedding_of_nothing(emulator: Emulator) -> None:
    with on_emulator(emulator):
        assert implementation("embedding")(torch.empty(2, 0, dtype=torch.int64), random(5, 8), -1, False).shape == (
            2,
            0,
            8,
        )
        ids = torch.empty(0, dtype=torch.int64)
        assert torch.equal(implementation("embedding_backward")(random(0, 8), ids, 5, -1), torch.zeros(5, 8))
        with pytest.raises(backend.NotCovered):
            implementation("embedding_accumulate_backward")(random(8, 5).t(), random(1, 8), torch.tensor([0]), -1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(emulator: Emulator, interleaved: bool, dtype: torch.dtype) -> None:
    for shape, pairs in (
        ((2, 3, 5, 64), 32),
        ((1, 2, 7, 64), 16),
        ((1, 1, 3, 10), 5),
        ((2, 1, 3, 9), 3),
        ((1, 2, 113, 16), 8),
    ):
        check_rope(emulator, shape, pairs, dtype, interleaved=interleaved)


CHECKS: dict[str, Callable[..., None]] = {
    "bias": lambda emulator, **run: (
        check_bias(emulator, "gelu", 300, 36, F32, **run), check_bias(emulator, "silu", 5, 37, F32, **run),
        check_bias(emulator, "relu", 3, 36, BF16, **run)),
    "adamw": lambda emulator, **run: (check_adamw(emulator, (4096, 5, 300), zero=True, **run),
                                      check_adamw(emulator, (41,), zero=True, skip=1, **run)),
    "embedding": lambda emulator, **run: check_embedding(emulator, 20, 6, 16, F32, **run),
    "rope": lambda emulator, **run: check_rope(emulator, (1, 3, 5, 24), 8, F32, interleaved=False, **run),
}  # fmt: skip


@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("mode", MODES[::4], ids="-".join)
def test_every_mode(emulator: Emulator, what: str, mode: tuple[str, str]) -> None:
    CHECKS[what](emulator, mode=mode, seed=5)


@pytest.mark.parametrize(("what", "bug"), [(what, bug.name) for what, bugs in BUGS.items() for bug in bugs])
def test_planted_bugs_are_caught(emulator: Emulator, what: str, bug: str) -> None:
    def passes(mode: tuple[str, str], seed: int) -> bool:
        try:
            CHECKS[what](emulator, mode=mode, seed=seed, bug=bug)
        except (EmulationError, AssertionError):
            return False
        return True

    assert not all(passes(mode, seed) for seed in range(2) for mode in MODES[::2])
