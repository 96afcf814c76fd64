"""metrics.jsonl and loss.png: what a run measured, one line of JSON for each evaluation, and a picture of it.

Keys of a line: step, train_loss, val_loss (nats per token, the same weights, dropout off), bigram_val_loss (the baseline on the same
validation tokens), val_bits_per_byte, tokens_per_s (training alone, since the line before; 0 at step 0), lr, elapsed_s.

The picture is drawn on a canvas of its own: no display is needed and matplotlib's global state stays untouched.
"""

import json
import os
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.train.files import replace_file, replace_text


class Metrics:
    """The lines of metrics.jsonl, in memory and on disk.

    Args:
        path: the file; lines that stand there are read.

    Raises:
        UserError: a line other than the last is not JSON. A last line cut short by a kill is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        raw = text.splitlines()
        for number, line in enumerate(raw, start=1):
            try:
                self.lines.append(json.loads(line))
            except ValueError as error:
                if number < len(raw):
                    raise UserError(f"{path}: line {number} is not JSON") from error

    def keep_until(self, step: int) -> None:
        """Drop the lines after `step`: a resume measures them again."""
        self.lines = [line for line in self.lines if line["step"] <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; it is on the disk when this returns."""
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def plot_losses(lines: list[dict[str, Any]], path: Path, title: str, unit: str = "nats per token") -> None:
    """Draw training and validation loss over steps, the bigram baseline where there is one, and the best evaluation, into a PNG.

    Args:
        lines: those of metrics.jsonl.
        path: the picture, replaced atomically.
        title: stands above it.
        unit: of the losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = [line["step"] for line in lines]
    validation = [line["val_loss"] for line in lines]
    marker = "o" if len(lines) < 40 else ""
    axes.plot(
        steps, [line["train_loss"] for line in lines], marker=marker, markersize=3, color="#4477aa", label="training"
    )
    axes.plot(steps, validation, marker=marker, markersize=3, color="#ee6677", label="validation (held out)")
    if lines:
        if (bigram := lines[-1].get("bigram_val_loss")) is not None:
            axes.axhline(bigram, color="#777777", linestyle="--", linewidth=1, label=f"bigram baseline {bigram:.3f}")
        best = min(range(len(lines)), key=lambda index: validation[index])
        place = (steps[best], validation[best])
        axes.annotate(
            f"best {place[1]:.3f} at step {place[0]:,}",
            place,
            xytext=(-8, 16),
            textcoords="offset points",
            ha="right",
            arrowprops={"arrowstyle": "-", "color": "#777777"},
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
