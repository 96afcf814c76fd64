"""The fine-tuning loop: epochs over a list of examples, shared by heads and conversations.

Optimizer, schedule, clipping, metrics, picture and progress are those of pretraining (fastgpt.train). What differs is the data: a few
thousand examples of different lengths, each read once an epoch. A batch holds examples of like length: every epoch shuffles all
examples, cuts the order into windows, sorts each window by length, cuts it into batches and shuffles those; padding then costs a few
per cent. The order is a function of the seed and the epoch.

There are no checkpoints: a run takes minutes, and one that is stopped leaves the weights of its last evaluation.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastgpt.errors import UserError
from fastgpt.finetune.recipe import Recipe
from fastgpt.terminal import counted
from fastgpt.train.evaluate import autocast
from fastgpt.train.metrics import Metrics, plot_losses
from fastgpt.train.optimizer import build_optimizer, update
from fastgpt.train.outcome import not_finite
from fastgpt.train.progress import Pace, Progress
from fastgpt.train.schedule import Schedule
from fastgpt.train.track import Tracking, tracker_names

WINDOW_BATCHES = 16  # batches' worth of examples sorted together
WARMUP_SHARE = 0.1


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
    """Train a model's trainable parameters.

    Args:
        model: in training mode during steps, in evaluation mode during `evaluate` and after the end.
        lengths: tokens of each training example.
        loss_of: a scalar loss of the examples with these numbers, called under autocast.
        evaluate: measures the held-out part; its values go into metrics.jsonl.
        keep: called after each evaluation with its line; writes the weights where it wants them.
        recipe: how.
        metrics: the run's lines.
        dtype: torch.float32, or torch.bfloat16 for autocast.
        unit: of the loss, for the picture beside the metrics.

    Returns:
        The last line of metrics.

    Raises:
        UserError: the loss is no longer a finite number.
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
    progress = Progress(0, steps)
    started, pace, total, seen = time.monotonic(), Pace(), 0.0, 0
    line: dict[str, Any] = {}
    told = dataclasses.asdict(recipe)
    tracking = Tracking(tracker_names(recipe.track), metrics.path.parent, told, 0, progress.say)
    title = f"{metrics.path.parent.name}: {counted(len(lengths), 'example')}, {counted(recipe.epochs, 'epoch')}"
    try:
        for step, batch in enumerate(plan, start=1):
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
    finally:
        progress.close()
        tracking.close()
        model.eval()
    return line
