"""Draws what the rungs wrote with --out: `python plot.py results.json FOLDER` makes ladder.png and one picture for each comparison."""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GROUPS = {
    "init ": "init.png",
    "activation ": "activations.png",
    "learning rate ": "learning_rates.png",
    "": "ladder.png",
}


def draw(results: dict, title: str, path: Path) -> None:
    """Validation loss over steps, one line a case, its end in the legend."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        steps, _, losses = zip(*result["curve"], strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, label=f"{name}: {losses[-1]:.3f}")
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats a character)", title=title, ylim=(1.9, 4.5))
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def main(source: str, folder: str) -> None:
    """All pictures of a results file."""
    results = json.loads(Path(source).read_text())
    for prefix, file in GROUPS.items():
        chosen = {name.removeprefix(prefix): results[name] for name in results if name.startswith(prefix)}
        results = {name: result for name, result in results.items() if not name.startswith(prefix) or not prefix}
        if chosen:
            draw(chosen, prefix.strip() or "the ladder", Path(folder) / file)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
