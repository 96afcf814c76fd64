"""kill -9 at random moments of training: nothing is lost but the steps since the last checkpoint, and the run always goes on.

    python tests/kill_training.py 50        # that many kills, a summary in the end; tests/test_kill_training.py has a few

Every attempt is a process of its own, forked from one that has imported everything, so that little time goes by outside training. It
writes a checkpoint every third step, which takes half of its time. After each kill the newest checkpoint must be whole and not older
than the last one that the attempt had finished. In the end losses and weights are, bit for bit, those of a run that nobody killed.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_run import TINY, text_file

from fastgpt.train import Trainer, load_config, loop, open_run, start_run
from fastgpt.train.checkpoint import latest_checkpoint, read_state

STARTING_SHARE = 0.2  # of the kills: at any moment of an attempt's first LONGEST_S, most of it spent on starting
LONGEST_S = 0.2  # the others fall into so long a time after its first step


@dataclass
class Summary:
    """What a storm of kills did.

    Attributes:
        kills: attempts that were killed.
        while_writing: those that left a checkpoint half written.
        before_first: those that had no checkpoint yet.
        steps_lost: steps done again in all.
    """

    kills: int = 0
    while_writing: int = 0
    before_first: int = 0
    steps_lost: int = 0


def _train(folder: Path, pipe: int) -> None:
    """In the child: train to the end; tell every step, and every checkpoint once it is written."""
    save = loop.save_checkpoint

    def told(*arguments, **options):
        path = save(*arguments, **options)
        os.write(pipe, f"saved {int(path.name[5:])}\n".encode())
        return path

    loop.save_checkpoint = told
    loop.PLOT_INTERVAL_S = 1e9  # a picture takes longer than all else up to it: every kill would fall into drawing
    trainer = Trainer(open_run(folder, [], {}), lambda _: None)
    step = trainer._step

    def counted(rate: float) -> float | None:
        loss = step(rate)
        os.write(pipe, f"step {trainer.state.step + 1}\n".encode())
        return loss

    trainer._step = counted
    trainer.fit()


def attempt(
    folder: Path, seconds: float | None, *, training: bool = False, work: Callable[[Path, int], None] = _train
) -> tuple[int, list[str]]:
    """Train in a child, killed after `seconds`, which count from its first step with `training`; its status and what it told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work(folder, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    told = []
    with os.fdopen(reading) as file:
        if training:
            told.append(file.readline().strip())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        told += file.read().splitlines()
    return os.waitpid(child, 0)[1], told


def storm(place: Path, kills: int, *, max_steps: int, seed: int) -> Summary:
    """Kill a run `kills` times, let it end, and compare it with a whole one.

    Raises:
        AssertionError: something was lost, or the run did not go on.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    changes = {
        "data.source": str(text_file(place)),
        "train.max_steps": str(max_steps),
        "train.eval_interval": "20",
        "train.checkpoint_interval": "3",
        "model.dropout": "0.1",
    }
    start_run(load_config(overrides=TINY | changes), place / "whole", lambda _: None)
    shutil.copytree(place / "whole", place / "killed")
    status, _ = attempt(place / "whole", None)
    assert status == 0
    summary, folder = Summary(), place / "killed"
    while summary.kills < kills:
        training = draw.random() > STARTING_SHARE
        status, told = attempt(folder, draw.random() * LONGEST_S, training=training)
        assert status == signal.SIGKILL, (
            f"an attempt ended by itself with status {status} after {summary.kills} kills: {told[-3:]}"
        )
        summary.kills += 1
        newest = latest_checkpoint(folder)
        saved = [int(line.split()[1]) for line in told if line.startswith("saved")]
        steps = [int(line.split()[1]) for line in told if line.startswith("step")]
        summary.while_writing += bool(list((folder / "checkpoints").glob(".tmp-*")))
        if newest is None:
            assert not saved
            summary.before_first += 1
            continue
        step = read_state(newest).step  # raises where a file is damaged
        assert step >= max(saved, default=0), (
            f"a checkpoint of step {max(saved)} was written, the newest is of step {step}"
        )
        summary.steps_lost += max([*steps, step]) - step
    status, _ = attempt(folder, None)
    assert status == 0
    compare(place / "whole", folder)
    return summary


def compare(whole: Path, killed: Path) -> None:
    """Raises AssertionError unless two runs have the same losses and weights."""
    timeless = ("step", "train_loss", "val_loss", "lr")
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, killed)]
    one, other = ([[line[key] for key in timeless] for line in part] for part in lines)
    assert one == other
    last = latest_checkpoint(whole)
    assert last is not None
    names = ["model.safetensors", *(f"checkpoints/{last.name}/{name}.safetensors" for name in ("model", "training"))]
    for name in names:
        one, other = load_file(whole / name), load_file(killed / name)
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert not list(killed.glob(".*"))
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (whole / "checkpoints").iterdir())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(storm(Path(place), int(sys.argv[1]), max_steps=int(sys.argv[1]) * 80, seed=1))
