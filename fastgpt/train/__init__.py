"""Training: configuration, optimizer, schedule, checkpoints, the loop.

    from fastgpt.train import Trainer, load_config, start_run

    run = start_run(load_config(overrides={"train.max_steps": "100"}), Path("run"), print)
    outcome = Trainer(run, print).fit()

`fastgpt.train.config` can be imported without torch; the names below load what they need at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.train.config import Config, load_config
    from fastgpt.train.loop import Trainer
    from fastgpt.train.outcome import Outcome
    from fastgpt.train.run import Run, open_run, start_run

__all__ = ["Config", "Outcome", "Run", "Trainer", "load_config", "open_run", "start_run"]

_LAZY = {
    "Config": "config",
    "load_config": "config",
    "Outcome": "outcome",
    "Trainer": "loop",
    "Run": "run",
    "open_run": "run",
    "start_run": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastgpt.train' has no attribute {name!r}")
    return getattr(import_module(f"fastgpt.train.{_LAZY[name]}"), name)
