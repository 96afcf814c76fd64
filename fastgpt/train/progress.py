"""What a run shows while it works: a bar on a terminal, a line now and then in a file or a CI log.

The bar has step, loss, tokens/s and the time left. Without a terminal a bar would fill the log with carriage returns, so there a plain
line comes at most every LOG_INTERVAL_S seconds. Messages go above the bar. All of it goes to stderr, the sample and the results to
stdout.
"""

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LOG_INTERVAL_S = 15.0


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """Tokens a second since the last evaluation, of training alone.

    Example:
        >>> pace = Pace()
        >>> pace.add(100, 0.5)
        >>> pace.take(), pace.tokens_per_s
        (200.0, 0.0)
    """

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count a step."""
        self._tokens += tokens
        self._seconds += seconds

    @property
    def tokens_per_s(self) -> float:
        """So far; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def take(self) -> float:
        """The same, and begin again."""
        found = self.tokens_per_s
        self._tokens, self._seconds = 0, 0.0
        return found


class Progress:
    """Progress of one run.

    Args:
        step: steps already done.
        max_steps: steps in all, None while not known.
        stream: where to write.
        quiet: write nothing: for all processes of a job but one.
    """

    def __init__(self, step: int, max_steps: int | None, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self.max_steps = max_steps
        self.first_step = step
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        if self.stream.isatty() and not quiet:
            self.bar = tqdm(
                total=max_steps,
                initial=step,
                file=self.stream,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.2,
                smoothing=0.05,
            )

    def set_max_steps(self, max_steps: int) -> None:
        """Tell the length of the run once it is known."""
        self.max_steps = max_steps
        if self.bar is not None:
            self.bar.total = max_steps
            self.bar.refresh()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """After each step."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line < LOG_INTERVAL_S:
            return
        self.last_line = now
        left = ""
        if self.max_steps is not None:
            left = f", {duration((now - self.started) / (step - self.first_step) * (self.max_steps - step))} left"
        of = f" of {self.max_steps:,}" if self.max_steps is not None else ""
        self.say(f"step {step:,}{of}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s{left}")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(message, file=self.stream)
        else:
            print(message, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the bar where it stands."""
        if self.bar is not None:
            self.bar.close()
