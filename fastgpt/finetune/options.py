"""Everything that `fastgpt finetune` can be told, in layers: the defaults of the task, a preset, the command line."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastgpt.errors import UserError
from fastgpt.finetune.recipe import Recipe
from fastgpt.train.config import convert_value, nearest, option
from fastgpt.train.track import tracker_names

TASKS = ("chat", "classify", "regress")
PRESETS = Path(__file__).with_name("presets")


@dataclass
class Options:
    """One fine-tuning."""

    task: str = option(
        "chat", "what to learn: answers in conversations, classes of texts, or numbers for texts", choices=TASKS
    )
    text_column: str | None = option(None, "the texts' column, by name or number from 1 (none: found by its name)")
    label_column: str | None = option(None, "the labels' column, by name or number from 1 (none: found by its name)")
    labels: str | None = option(None, "the classes, separated by commas (none: those in the data)")
    encoding: str | None = option(None, "the data's encoding, such as latin-1 (none: UTF-8, or by its byte-order mark)")
    val_fraction: float = option(0.2, "share of the examples held out and measured", above=0.0, at_most=0.5)
    split_seed: int = option(1337, "seed of the choice of what is held out", at_least=0, at_most=2**63 - 1)
    pooling: str = option("mean", "the head reads the mean of all tokens or the last one", choices=("mean", "last"))
    class_weights: str = option(
        "none", "weigh the classes alike (balanced) or every text alike", choices=("none", "balanced")
    )
    lora_rank: int = option(
        0, "train low-rank updates of this rank instead of all weights (0: all weights)", at_least=0
    )
    lora_alpha: float = option(16.0, "LoRA's scale: updates count alpha / rank times", above=0.0)
    lora_dropout: float = option(0.0, "dropout before the low-rank updates", at_least=0.0, below=1.0)
    packing: bool = option(
        False, "conversations of a batch in one row without padding, none seeing another (false: a padded row each)"
    )
    epochs: int = option(3, "passes over the training examples", at_least=1)
    batch_size: int = option(16, "examples a step", at_least=1)
    learning_rate: float = option(5e-4, "peak learning rate", above=0.0)
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only", at_least=0.0)
    grad_clip: float = option(1.0, "largest norm of the gradient (0: no clipping)", at_least=0.0)
    dropout: float | None = option(None, "dropout (none: the pretrained model's)", at_least=0.0, below=1.0)
    evals_per_epoch: int = option(1, "measurements on the held-out part each epoch", at_least=1)
    checkpoint_interval: int | None = option(
        None, "steps between checkpoints (none: at each measurement and every minute)", at_least=1
    )
    seed: int = option(1337, "seed of new weights, the order and dropout", at_least=0, at_most=2**63 - 1)
    device: str = option("auto", "where to train: 'auto', 'cpu', 'cuda' or 'cuda:N'")
    dtype: str = option("auto", "number format of the matrix products", choices=("auto", "float32", "bfloat16"))
    threads: int = option(0, "threads for the CPU (0: torch's own choice)", at_least=0)
    track: str = option("", "also send the measurements to tensorboard, trackio or wandb; several with commas")

    def recipe(self) -> Recipe:
        """The part that the loop needs."""
        return Recipe(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Recipe)})


def preset_names() -> list[str]:
    """The names that `--preset` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _apply(options: Options, layer: Mapping[str, Any], *, from_text: bool) -> None:
    fields = {item.name: item for item in dataclasses.fields(Options)}
    hints = typing.get_type_hints(Options)
    for name, value in layer.items():
        if name not in fields:
            raise UserError(f"unknown option {name!r}{nearest(name, fields)}")
        key = f"--{name.replace('_', '-')}" if from_text else name
        setattr(options, name, convert_value(key, value, hints[name], fields[name].metadata, from_text=from_text))


def change_options(options: Options, given: Mapping[str, str]) -> Options:
    """The options with values of the command line put over them, in place.

    Raises:
        UserError: as `load_options`.
    """
    _apply(options, given, from_text=True)
    tracker_names(options.track)
    return options


def load_options(preset: str | None, given: Mapping[str, str]) -> Options:
    """Defaults, then a preset, then values of the command line.

    Raises:
        UserError: an unknown preset, a value out of range, or a tracker that is not there.

    Example:
        >>> load_options("sms-spam", {"epochs": "1"}).task
        'classify'
    """
    options = Options()
    if preset is not None:
        if preset not in preset_names():
            raise UserError(
                f"unknown preset {preset!r}{nearest(preset, preset_names())}; there are: {', '.join(preset_names())}"
            )
        _apply(options, yaml.safe_load((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8")), from_text=False)
    return change_options(options, given)
