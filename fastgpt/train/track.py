"""Where else a run's measurements go: TensorBoard, trackio, Weights & Biases.

metrics.jsonl and loss.png are always written. `--track`, of training and of fine-tuning, names trackers that get the same numbers at
each evaluation:

    tensorboard   event files below RUN/tensorboard                       (`tensorboard --logdir runs`)
    trackio       its local database, project "fastgpt"                   (`trackio show`)
    wandb         its server, or RUN/wandb with WANDB_MODE=offline        project "fastgpt"

A tracker is never worth a run: one that fails while the run goes on is left out from there, with a note. A resumed run goes on under
the same name.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fastgpt.errors import UserError

PROJECT = "fastgpt"


class Tracker(Protocol):
    """What a run needs of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers of a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # Events after the step of a resume belong to steps that are done again.
        self.writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self.module = import_module("trackio")
        self.module.init(project=PROJECT, name=folder.name, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        module = import_module("wandb")
        known = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = module.init(
            project=PROJECT, name=folder.name, id=known, resume="allow", dir=str(folder), config=dict(config)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
}


def tracker_names(text: str) -> list[str]:
    """The names given to `--track`, which commas separate.

    Raises:
        UserError: an unknown one, or one that is not installed.

    Example:
        >>> tracker_names(""), tracker_names("wandb, tensorboard")  # doctest: +SKIP
        ([], ['wandb', 'tensorboard'])
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track is {text!r}; accepted are {', '.join(TRACKERS)}, with commas between them")
        if find_spec(name) is None:
            raise UserError(f"--track: {name} is not installed; pip install 'fastgpt-kernels[{name}]'")
    return names


class Tracking:
    """The trackers of a run.

    Args:
        names: of TRACKERS; none of them does nothing.
        folder: the run folder.
        config: the run's options by dotted name.
        step: where the run stands.
        say: receives notes.

    Raises:
        UserError: a tracker does not start.

    Example:
        >>> tracking = Tracking(["tensorboard"], run.folder, {}, 0, print)  # doctest: +SKIP
        >>> tracking.log({"step": 10, "val_loss": 2.5})  # doctest: +SKIP
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int, say: Callable[[str], None]
    ) -> None:
        self.say = say
        self.active: dict[str, Tracker] = {}
        for name in names:
            try:
                self.active[name] = TRACKERS[name](folder, config, step)
            except Exception as error:
                self.close()
                raise UserError(f"--track: {name} does not start: {_line(error)}") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl."""
        values = {key: float(value) for key, value in line.items() if key != "step"}
        for name in list(self.active):
            try:
                self.active[name].log(int(line["step"]), values)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """End all of them."""
        for name in list(self.active):
            try:
                self.active.pop(name).close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.active.pop(name, None)
        self.say(f"note: {name} has failed and is left out from here ({_line(error)}); metrics.jsonl has everything")


def _line(error: Exception) -> str:
    """An error's first line."""
    return (str(error) or type(error).__name__).split("\n", 1)[0]
