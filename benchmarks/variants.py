"""Variants of one computation: held to the exact result, then timed in turns. harness.py says in which order, and why.

Statistics are pytest-benchmark's, which is not needed to import this module: the GPU benchmark does without.
"""

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pytest_benchmark.stats import Metadata

ROUND_S = 0.02
MIN_ROUNDS, MAX_ROUNDS = 7, 25
BUDGET_S = 1.0
QUICK_ROUNDS = 2

SLACK = 4 * torch.finfo(torch.float32).eps  # a baseline that is right by luck must not fail ours
OURS_AT_MOST = {"fp32": 1e-4, "bf16": 3e-2}
# Wider, because torch's own sums can be that far off: the bias gradient of its bf16 layer norm over 8192 rows by 11 %, its fp32 norm of
# 124M gradients by 0.08 % (so that clipped moments are by 0.15 %). It is there to catch variants that were set up differently.
OTHERS_AT_MOST = {"fp32": 1e-2, "bf16": 0.2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHOD = (
    f"median of {MIN_ROUNDS} to {MAX_ROUNDS} rounds of at least {ROUND_S * 1e3:.0f} ms, variants in turns; "
    "training steps of larger models 3 to 5 rounds"
)


@dataclasses.dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        name: as tables show it.
        run: computes; what it returns is compared, and nothing else is timed.
        ours: whether it is fastgpt.
        before: runs before each round, untimed.
        optional: left out, with the reason recorded, where its first run raises (a compiler that is not there).
        first: runs instead of `run` for the comparison, where more than one call is to be compared.
        halves: it multiplies fp32 numbers as bf16, as torch's "medium" precision allows: held to bf16's limit.
    """

    name: str
    run: Callable[[], Any]
    ours: bool = False
    before: Callable[[], None] | None = None
    optional: bool = False
    first: Callable[[], Any] | None = None
    halves: bool = False


def ours(run: Callable[[], Any], name: str = "fastgpt", before: Callable[[], None] | None = None) -> Variant:
    """A variant that is fastgpt."""
    return Variant(name, run, ours=True, before=before)


class DisagreementError(AssertionError):
    """Variants of a case that do not compute the same; there is nothing to time."""


def error_of(result: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; infinite where shapes differ or a value is NaN or not finite
    where it should be."""
    if result.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    difference = (result.detach().double() - expected.detach().double()).abs().max().item()
    largest = expected.detach().abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return float(difference / largest if largest else difference)


def check(variants: Sequence[Variant], errors: Sequence[Sequence[float]], dtype: str) -> None:
    """Hold every variant to the rule in the module's docstring.

    Args:
        variants: of one case.
        errors: for each variant, those of the tensors it returned.
        dtype: "fp32" or "bf16".

    Raises:
        DisagreementError: a variant breaks the rule; names it, its errors and the limits.
    """
    baseline = next((e for v, e in zip(variants, errors, strict=True) if not v.ours), None)
    for variant, found in zip(variants, errors, strict=True):
        precision = "bf16" if variant.halves else dtype
        limits = [(OURS_AT_MOST if variant.ours else OTHERS_AT_MOST)[precision]] * len(found)
        if variant.ours and baseline is not None and not variant.halves:
            limits = [min(limit, 2 * base + SLACK) for limit, base in zip(limits, baseline, strict=True)]
        if any(not error <= limit for error, limit in zip(found, limits, strict=True)):
            shown = ", ".join(f"{error:.3g} (limit {limit:.3g})" for error, limit in zip(found, limits, strict=True))
            raise DisagreementError(f"{variant.name}: relative errors against float64: {shown}")


def time_round(variant: Variant, iterations: int, timer: Callable[[], float] = perf_counter) -> float:
    """Seconds that `iterations` calls take together, with garbage collection off."""
    if variant.before is not None:
        variant.before()
    run, loop = variant.run, range(iterations)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = timer()
        for _ in loop:
            run()
        return timer() - start
    finally:
        if collecting:
            gc.enable()


def calibrate(variant: Variant, round_s: float, timer: Callable[[], float] = perf_counter) -> int:
    """How many calls take at least `round_s` seconds; warms the variant up on the way."""
    iterations = 1
    while (took := time_round(variant, iterations, timer)) < round_s:
        grown = math.ceil(1.2 * iterations * round_s / max(took, 1e-9))
        iterations = max(iterations + 1, min(grown, 10 * iterations))  # a first call may be far slower than the rest
    return iterations


def measure(
    variants: Sequence[Variant],
    statistics: "Callable[[Variant, int], Metadata]",
    *,
    quick: bool = False,
    rounds: int | None = None,
    timer: Callable[[], float] = perf_counter,
) -> "list[Metadata]":
    """Time the variants in turns.

    Args:
        variants: each must have run before.
        statistics: makes pytest-benchmark's record for a variant and its number of calls a round.
        quick: QUICK_ROUNDS of one call each, to see that it runs.
        rounds: exactly so many of one call each, for variants that take seconds; None for MIN_ROUNDS to MAX_ROUNDS within BUDGET_S.
        timer: a clock in seconds.

    Returns:
        A record for each variant, its times for one call.
    """
    iterations = [1 if quick or rounds else calibrate(variant, ROUND_S, timer) for variant in variants]
    records = [statistics(variant, n) for variant, n in zip(variants, iterations, strict=True)]
    least = QUICK_ROUNDS if quick else rounds or MIN_ROUNDS
    most = least if quick or rounds else MAX_ROUNDS
    start, done = timer(), 0
    while done < least or (done < most and timer() - start < BUDGET_S):
        for i in range(len(variants)):
            turn = (i + done) % len(variants)
            records[turn].update(time_round(variants[turn], iterations[turn], timer))
        done += 1
    return records
