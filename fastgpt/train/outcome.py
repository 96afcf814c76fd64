"""How a run ends, in the words that the user reads."""

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from fastgpt.train.checkpoint import TrainState
from fastgpt.train.parallel import Group, launcher
from fastgpt.train.progress import duration


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished", "patience", "interrupted" or "diverged".
        message: one line for the user.
        state: the run's state.
        signal: the number of the signal that interrupted it, else 0.
    """

    status: str
    message: str
    state: TrainState
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """That of the process: 0, 1 where the run diverged, 128 + N after signal N."""
        return 1 if self.status == "diverged" else 128 + self.signal if self.status == "interrupted" else 0


def finished(state: TrainState) -> Outcome:
    """The length is reached."""
    return Outcome("finished", f"finished after {state.step:,} steps in {duration(state.elapsed_s)}", state)


def interrupted(state: TrainState, folder: Path, group: Group, number: int) -> Outcome:
    """A signal came; 0 for one that another process of the job has got."""
    command = f"{launcher(group)} train --resume {shlex.quote(str(folder))}"
    message = f"stopped after step {state.step:,}; a checkpoint is written. To go on: {command}"
    return Outcome("interrupted", message, state, number or signal.SIGTERM)


def out_of_patience(state: TrainState) -> Outcome:
    """The validation loss has not improved for too long."""
    message = (
        f"stopped at step {state.step:,}: the validation loss has not improved for {state.evals_without_better} evaluations "
        f"(best {state.best_loss:.4f} at step {state.best_step:,}, whose weights are kept); train.patience decides how many"
    )
    return Outcome("patience", message, state)


def not_finite(step: int, learning_rate: float) -> str:
    """What every loop says where the loss is no number any more."""
    return f"the loss is no longer a finite number at step {step:,} (learning rate {learning_rate:.3g})"


def diverged(state: TrainState, learning_rate: float, last_good: Path | None) -> Outcome:
    """The loss of the next step is not finite."""
    good = f"the last good checkpoint is {last_good}" if last_good is not None else "there is no checkpoint yet"
    message = (
        f"{not_finite(state.step + 1, learning_rate)}; {good}. "
        "A lower train.learning_rate or a longer train.warmup_steps usually helps"
    )
    return Outcome("diverged", message, state)
