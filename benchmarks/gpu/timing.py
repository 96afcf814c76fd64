"""Times of calls on a GPU: CUDA events, the L2 cache flushed before every call, variants in turns, medians and quartiles.

Before each call a short sleep is put on the stream, so that the kernels of a call are all queued when it begins: what is timed is the
device, not Python. The flush writes a buffer of twice the L2 cache. What a variant does `before` each call is not timed. On the CPU
(for tests) a wall clock stands in.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..variants import Variant

MIN_ROUNDS, MAX_ROUNDS = 10, 60
BUDGET_S = 1.2  # of one case, all variants together
SLEEP_CYCLES = 1_500_000  # just under a millisecond
METHOD = f"CUDA events, L2 flushed before each call, one call a round, {MIN_ROUNDS} to {MAX_ROUNDS} rounds, variants in turns; median"


class Timer(Protocol):
    """Times one call."""

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds that the call took."""
        ...


class CudaTimer:
    """CUDA events around a call, behind a sleep and a flush; see the module's docstring."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._flush = torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.int8, device=device)
        self._start, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, run: Callable[[], object]) -> float:
        torch.cuda._sleep(SLEEP_CYCLES)
        self._flush.zero_()
        self._start.record()
        run()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


class WallTimer:
    """A wall clock around a call, for devices without events."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __call__(self, run: Callable[[], object]) -> float:
        start = self._clock()
        run()
        return self._clock() - start


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one variant's calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartile_range(self) -> float:
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def _timed(variant: Variant, timer: Timer) -> float:
    if variant.before is not None:
        variant.before()
    return timer(variant.run)


def measure(
    variants: Sequence[Variant],
    timer: Timer,
    clock: Callable[[], float] = time.perf_counter,
    *,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
) -> list[Times]:
    """Rounds through all variants, each beginning with another one; each variant must have run before.

    Args:
        variants: what to time.
        timer: times a call.
        clock: seconds; ends a case after BUDGET_S.
        rounds: the least and the most.

    Returns:
        The times of each variant.
    """
    for variant in variants:
        _timed(variant, timer)  # warm
    seconds: list[list[float]] = [[] for _ in variants]
    begun, done = clock(), 0
    while done < rounds[0] or (done < rounds[1] and clock() - begun < BUDGET_S):
        for i in range(len(variants)):
            turn = (i + done) % len(variants)
            seconds[turn].append(_timed(variants[turn], timer))
        done += 1
    return [Times(tuple(found)) for found in seconds]
