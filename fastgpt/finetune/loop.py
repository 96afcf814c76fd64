"""The fine-tuning loop: epochs over a list of examples, shared by heads and conversations.

Optimizer, schedule, clipping, metrics, picture and progress are those of pretraining (fastgpt.train). What differs is the data: a few
thousand examples of different lengths, each read once an epoch. A batch holds examples of like length: every epoch shuffles all
examples, cuts the order into windows, sorts each window by length, cuts it into batches and shuffles those; padding then costs a few
per cent. The order is a function of the seed and the epoch.

A checkpoint (fastgpt.finetune.checkpoint) is written at every evaluation and every minute, or every `checkpoint_interval` steps. Where
one lies in the run folder, the run goes on from it, on a CPU bit for bit.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.errors import UserError
from fastgpt.finetune.checkpoint import load_state, save_state
from fastgpt.finetune.recipe import CHECKPOINT, Recipe
from fastgpt.terminal import counted
from fastgpt.train.evaluate import autocast
from fastgpt.train.files import explain_writing, remove_leftovers
from fastgpt.train.metrics import Metrics, plot_losses
from fastgpt.train.optimizer import build_optimizer, update
from fastgpt.train.outcome import not_finite
from fastgpt.train.progress import Pace, Progress
from fastgpt.train.run import write_summary
from fastgpt.train.schedule import Schedule
from fastgpt.train.signals import StopSignals
from fastgpt.train.track import Tracking, tracker_names

WINDOW_BATCHES = 16  # batches' worth of examples sorted together
WARMUP_SHARE = 0.1
CHECKPOINT_S = 60.0  # between checkpoints, where no number of steps is given


class Stopped(Exception):
    """Ctrl-C or SIGTERM: a checkpoint of step `step` is written; `number` is the signal's."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step:,}; a checkpoint is written")
        self.step, self.number = step, number


def batches_of(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as lists of example numbers: every example once, those of a batch of like length.

    Args:
        lengths: tokens of each example.
        batch_size: examples a batch; the last of a window may have fewer.
        seed, epoch: decide the order.

    Example:
        >>> sorted(sum(batches_of([5, 1, 9, 2], 2, seed=1, epoch=0), []))
        [0, 1, 2, 3]
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=epoch))
    order = generator.permutation(len(lengths)).tolist()
    found: list[list[int]] = []
    for begin in range(0, len(order), WINDOW_BATCHES * batch_size):
        window = sorted(order[begin : begin + WINDOW_BATCHES * batch_size], key=lengths.__getitem__)
        found += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    return [found[at] for at in generator.permutation(len(found)).tolist()]


def in_order(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches for an evaluation: every example once, sorted by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(B, T) int64: rows filled up on the right with `value` to the longest.

    Example:
        >>> pad([[1, 2], [3]], 0).tolist()
        [[1, 2], [3, 0]]
    """
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)


def fit(
    model: torch.nn.Module,
    lengths: Sequence[int],
    loss_of: Callable[[list[int]], torch.Tensor],
    evaluate: Callable[[], dict[str, float]],
    keep: Callable[[dict[str, float]], None],
    recipe: Recipe,
    metrics: Metrics,
    dtype: torch.dtype,
    unit: str = "nats per token",
) -> dict[str, float]:
    """Train a model's trainable parameters, or go on where the checkpoint beside the metrics stands.

    Args:
        model: in training mode during steps, in evaluation mode during `evaluate` and after the end.
        lengths: tokens of each training example.
        loss_of: a scalar loss of the examples with these numbers, called under autocast.
        evaluate: measures the held-out part; its values go into metrics.jsonl.
        keep: called after each evaluation with its line, which is the last of the metrics then; writes the weights where it wants
            them. After a kill it may be called again with the same.
        recipe: how.
        metrics: the run's lines.
        dtype: torch.float32, or torch.bfloat16 for autocast.
        unit: of the loss, for the picture beside the metrics.

    Returns:
        The last line of metrics.

    Raises:
        UserError: the loss is no longer a finite number, the checkpoint cannot be used, or a file cannot be written.
        Stopped: Ctrl-C or SIGTERM came.
    """
    device = next(model.parameters()).device
    optimizer = build_optimizer(
        model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
    )
    plan = [
        batch for epoch in range(recipe.epochs) for batch in batches_of(lengths, recipe.batch_size, recipe.seed, epoch)
    ]
    steps, each = len(plan), len(plan) / (recipe.epochs * recipe.evals_per_epoch)
    stops = {round(each * (number + 1)) for number in range(recipe.epochs * recipe.evals_per_epoch)} | {steps}
    peak = recipe.learning_rate
    schedule = Schedule(peak, peak / 100, math.ceil(steps * WARMUP_SHARE), steps)
    folder, checkpoint = metrics.path.parent, metrics.path.with_name(CHECKPOINT)
    done, before, total, seen = 0, 0.0, 0.0, 0
    if resumed := checkpoint.is_file():
        state = load_state(checkpoint, model, optimizer)
        done, before, total, seen = (state[name] for name in ("step", "elapsed_s", "total", "seen"))
        if state["steps"] != steps:
            raise UserError(f"the checkpoint {checkpoint} is of a run of {state['steps']:,} steps, not {steps:,}")
    progress, started, pace = Progress(done, steps), time.monotonic() - before, Pace()
    saved_at, every = time.monotonic(), recipe.checkpoint_interval
    title = f"{folder.name}: {counted(len(lengths), 'example')}, {counted(recipe.epochs, 'epoch')}"

    def save(step: int) -> None:
        state = {"step": step, "steps": steps, "elapsed_s": time.monotonic() - started, "total": total, "seen": seen}
        save_state(checkpoint, model, optimizer, state)

    signals, tracking = StopSignals(), Tracking([], folder, {}, 0, progress.say)
    advice = f"`fastgpt finetune --resume {shlex.quote(str(folder))}` goes on from the last checkpoint"
    try:
        with signals, explain_writing(folder, advice):
            for place in (folder, folder / "adapter"):
                remove_leftovers(place)
            metrics.keep_until(done if resumed else -1)
            tracking = Tracking(tracker_names(recipe.track), folder, dataclasses.asdict(recipe), done, progress.say)
            if resumed:
                progress.say(f"going on from step {done:,} of {steps:,}")
            for step, batch in enumerate(plan[done:], start=done + 1):
                begun = time.monotonic()
                model.train()
                rate = schedule.at(step - 1)
                with autocast(device, dtype):
                    loss = loss_of(batch)
                loss.backward()
                value = loss.item()
                if not update(optimizer, value, rate, recipe.grad_clip):
                    raise UserError(f"{not_finite(step, rate)}; a lower --learning-rate usually helps")
                pace.add(sum(lengths[number] for number in batch), time.monotonic() - begun)
                total, seen = total + value, seen + 1
                progress.update(step, value, pace.tokens_per_s)
                if step in stops:
                    model.eval()
                    with torch.no_grad(), autocast(device, dtype):
                        found = evaluate()
                    line = {
                        "step": step,
                        "epoch": step * recipe.epochs / steps,
                        "train_loss": total / seen,
                        **found,
                        "tokens_per_s": round(pace.take(), 1),
                        "lr": rate,
                        "elapsed_s": round(time.monotonic() - started, 3),
                    }
                    metrics.append(line)
                    tracking.log(line)
                    words = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                    progress.say(f"step {step:,} of {steps:,}: training loss {total / seen:.4f}, {words}")
                    plot_losses(metrics.lines, metrics.path.with_name("loss.png"), title, unit)
                    keep(line)
                    total, seen = 0.0, 0
                late = time.monotonic() - saved_at > CHECKPOINT_S
                if step % every == 0 if every else step in stops or late or signals.number:
                    save(step)
                    saved_at = time.monotonic()
                if signals.number and step < steps:
                    if every and step % every:
                        save(step)
                    raise Stopped(step, signals.number)
    finally:
        progress.close()
        tracking.close()
        model.eval()
    return metrics.lines[-1]


def finish(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, the last of a run, and remove the checkpoint, which nothing goes on from any more.

    Raises:
        UserError: it cannot be written.
    """
    with explain_writing(folder):
        write_summary(folder, summary)
    (folder / CHECKPOINT).unlink(missing_ok=True)
