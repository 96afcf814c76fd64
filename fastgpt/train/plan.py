"""The length of a run and how often it is evaluated.

Steps and epochs are known from the start. A time budget becomes steps once: the first steps are timed (the very first ones left out,
because they allocate memory and start threads), and what is left of the budget is divided by the time of a step, evaluations allowed
for. The result is stored with the run, so that the learning rate's cosine has an end and a resume has the same one.
"""

import math

EVALUATIONS = 10  # in a run that leaves train.eval_interval open
UNTIMED_STEPS = 3
LEAST_TIMED_STEPS = 5
EVAL_SHARE = 0.1  # of a time budget, for evaluations
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

    def plan(self, step: int, elapsed_s: float) -> tuple[int, int]:
        """The length of the run in steps and the steps between evaluations, so that both fit into what is left.

        Where the interval is open, evaluations may take EVAL_SHARE of the time, EVALUATIONS of them at most and two at least: on a
        slow machine there are fewer of them and not fewer steps.

        Args:
            step: steps done.
            elapsed_s: seconds of the budget used.

        >>> budget = Budget(10.0, eval_every=5)
        >>> budget.eval_s = 1.0
        >>> _ = [budget.add(0.3, 0.0) for _ in range(10)]
        >>> budget.plan(step=10, elapsed_s=5.0)  # 5 s / (0.3 s + 1.0 s / 5) more steps
        (20, 5)
        """
        left = self.seconds - elapsed_s
        step_s = self._timed_s / max(self._steps - UNTIMED_STEPS, 1)
        if self.eval_every is not None:
            per_step = step_s + self.eval_s / self.eval_every
            return step + (int(left / per_step) if left > 0 < step_s else 0), self.eval_every
        evaluations = EVALUATIONS
        if self.eval_s > 0:
            evaluations = min(max(int(EVAL_SHARE * left / self.eval_s), 2), EVALUATIONS)
        left -= evaluations * self.eval_s
        max_steps = step + (int(left / step_s) if left > 0 < step_s else 0)
        return max_steps, max(math.ceil(max_steps / evaluations), 1)
