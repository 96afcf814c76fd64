"""The length of a run and how often it is evaluated.

Steps and epochs are known from the start. A time budget becomes steps once: the first steps are timed (the very first ones left out,
because they allocate memory and start threads), and what is left of the budget is divided by the time of a step, evaluations allowed
for. The result is stored with the run, so that the learning rate's cosine has an end and a resume has the same one.
"""

import math

EVALUATIONS = 10  # in a run that leaves train.eval_interval open
UNTIMED_STEPS = 3
LEAST_TIMED_STEPS = 5
MEASURED_SHARE = 0.05  # of a time budget, spent on timing steps


def eval_interval(max_steps: int) -> int:
    """Steps between evaluations where the configuration leaves it open."""
    return max(math.ceil(max_steps / EVALUATIONS), 1)


class Budget:
    """Turns a time budget into steps.

    Args:
        seconds: the whole budget.
        eval_every: steps between evaluations, None where it follows from the length.
    """

    def __init__(self, seconds: float, eval_every: int | None) -> None:
        self.seconds = seconds
        self.eval_every = eval_every
        self.eval_s = 0.0
        self._steps, self._timed_s = 0, 0.0

    def add(self, step_s: float, elapsed_s: float) -> bool:
        """Note a step that took `step_s`; True once enough is known, or the budget is used up.

        Args:
            step_s: seconds of this step.
            elapsed_s: seconds of the budget used so far.
        """
        self._steps += 1
        self._timed_s += step_s if self._steps > UNTIMED_STEPS else 0.0
        enough = self._steps >= UNTIMED_STEPS + LEAST_TIMED_STEPS and self._timed_s >= MEASURED_SHARE * self.seconds
        return enough or elapsed_s >= self.seconds

    def steps_left(self, elapsed_s: float) -> int:
        """How many more steps fit into the budget, evaluations (`eval_s` seconds each) included.

        >>> budget = Budget(10.0, eval_every=5)
        >>> budget.eval_s = 1.0
        >>> _ = [budget.add(0.3, 0.0) for _ in range(10)]
        >>> budget.steps_left(elapsed_s=5.0)  # 5 s / (0.3 s + 1.0 s / 5)
        10
        """
        left = self.seconds - elapsed_s
        if self.eval_every is None:
            left -= EVALUATIONS * self.eval_s
        if left <= 0 or self._steps <= UNTIMED_STEPS:
            return 0
        step_s = self._timed_s / (self._steps - UNTIMED_STEPS)
        return int(left / (step_s if self.eval_every is None else step_s + self.eval_s / self.eval_every))
