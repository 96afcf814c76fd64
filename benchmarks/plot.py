"""A picture of one result file: for every case a bar a variant, as long as it is fast, with its time and how it compares.

Lengths are speed relative to the case's baseline (the first variant that is not fastgpt), which stands at the dashed line; times differ
by a factor of a thousand between cases and would not fit one axis.
"""

import math
from pathlib import Path
from typing import Any

from . import record

OURS = "#1f6feb"
OTHERS = ("#6e7781", "#a8b0b8", "#8c6d46", "#c69c6d", "#57606a")
BAR_INCHES = 0.2
CASE_GAP = 0.9  # in bars
WIDTH_INCHES = 10.0  # of a column
COLUMN_BARS = 75
LONGEST = 12.0  # times the baseline; longer bars are cut, their label says the ratio


def draw(file: Path) -> Path:
    """Draw a result file to a PNG beside it, and return that.

    Raises:
        ValueError: the file is not a benchmark's result.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    result = record.read(file)
    cases = result["cases"]
    bars = sum(len(case["variants"]) for case in cases) + CASE_GAP * len(cases)
    columns = _columns(cases, math.ceil(bars / COLUMN_BARS))
    tallest = max(sum(len(case["variants"]) + CASE_GAP for case in column) for column in columns)
    size = (WIDTH_INCHES * len(columns), 1.6 + BAR_INCHES * tallest)
    figure, places = pyplot.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False)
    colours = _colours(cases)
    for axes, column in zip(places[0], columns, strict=True):
        _bars(axes, column, colours)
        axes.set_ylim(tallest - CASE_GAP, -1)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(_title(result), fontsize=9, x=0.99, ha="right")
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return picture


def _columns(cases: list[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """The cases in order, in at most `count` columns of about as many bars each."""
    total = sum(len(case["variants"]) + CASE_GAP for case in cases)
    columns: list[list[dict[str, Any]]] = [[]]
    height = 0.0
    for case in cases:
        if columns[-1] and height >= total / count * len(columns):
            columns.append([])
        columns[-1].append(case)
        height += len(case["variants"]) + CASE_GAP
    return columns


def _bars(axes: Any, cases: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """The cases from top to bottom, a bar a variant."""
    y, longest = 0.0, 1.0
    ticks, labels = [], []
    for case in cases:
        rows = case["variants"]
        base = next((row["median_ms"] for row in rows if not row["ours"]), rows[0]["median_ms"])
        ticks.append(y + (len(rows) - 1) / 2)
        labels.append(case["name"])
        for row in rows:
            speed = min(base / row["median_ms"], LONGEST)
            longest = max(longest, speed)
            axes.barh(y, speed, height=0.86, color=colours[row["name"]])
            text = axes.text(speed, y, f" {_label(row, base)}", va="center", ha="left", fontsize=7)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8})
            y += 1
        y += CASE_GAP
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_xlim(0, 1.35 * longest + 0.4)
    axes.set_xlabel("speed relative to the baseline, the first that is not fastgpt (longer is faster)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)


def _colours(cases: list[dict[str, Any]]) -> dict[str, str]:
    """A colour a variant: fastgpt's in shades of blue, others in greys and browns, in order of appearance."""
    blues = iter((OURS, "#54a0ff", "#a5cdff", "#0b3d91"))
    greys = iter(OTHERS)
    found: dict[str, str] = {}
    for case in cases:
        for row in case["variants"]:
            if row["name"] not in found:
                found[row["name"]] = next(blues if row["ours"] else greys, "#d0d7de")
    return found


def _label(row: dict[str, Any], base: float) -> str:
    time = f"{row['median_ms']:.3g} ms" if row["median_ms"] < 100 else f"{row['median_ms']:.0f} ms"
    if "tokens_per_s" in row:
        rate = f"{row['tokens_per_s']:,.0f} tokens/s"
    elif "gflop_per_s" in row:
        rate = f"{row['gflop_per_s']:.3g} GFLOP/s"
    else:
        rate = f"{row['gb_per_s']:.3g} GB/s" if "gb_per_s" in row else ""
    ratio = f"{base / row['median_ms']:.2f}x"
    return ", ".join(filter(None, [ratio, time, rate]))


def _title(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result.get("versions", {})
    return (
        f"{result['benchmark']}: {machine['chip']}, {machine.get('threads')} threads, {machine.get('isa')}\n"
        f"torch {versions.get('torch')}, fastgpt {versions.get('fastgpt')}, {result.get('date', '')[:10]}"
    )
