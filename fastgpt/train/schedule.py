"""The learning rate of a step: linear warm-up, then a cosine down to a floor.

    step <  warmup_steps                 peak * (step + 1) / (warmup_steps + 1)
    step >= warmup_steps                 floor + (peak - floor) * (1 + cos(pi * p)) / 2
                                         p = (step - warmup_steps) / (max_steps - warmup_steps), at most 1
    max_steps not yet known              peak, after the warm-up

The cosine is that of SGDR without restarts (Loshchilov and Hutter, arXiv 1608.03983, equation 5). Steps count from 0. The rate is a
function of the step alone, so a resumed run has it without any stored state.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Warm-up and cosine.

    Args:
        peak: learning rate at the end of the warm-up.
        floor: learning rate at `max_steps` and after it.
        warmup_steps: number of steps below the peak.
        max_steps: length of the run; None while a time budget has not been turned into steps.

    Example:
        >>> Schedule(peak=1e-3, floor=1e-4, warmup_steps=100, max_steps=2000).at(2000)
        0.0001
    """

    peak: float
    floor: float
    warmup_steps: int
    max_steps: int | None

    def at(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.max_steps is None:
            return self.peak
        if step >= self.max_steps:
            return self.floor
        progress = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
