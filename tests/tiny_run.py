"""A real run small enough for a test: character level, two thin layers, milliseconds a step."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

TINY = {
    "tokenizer.type": "char",
    "model.block_size": "16",
    "model.n_layer": "2",
    "model.n_head": "2",
    "model.n_embd": "16",
    "train.batch_size": "4",
    "train.warmup_steps": "4",
    "train.learning_rate": "1e-2",
    "train.max_steps": "12",
    "train.eval_interval": "4",
    "train.eval_tokens": "128",
    "train.patience": "0",
    "train.sample_tokens": "0",
    "train.device": "cpu",
    "train.dtype": "float32",
    "train.threads": "1",
}


def text_file(folder: Path, n_lines: int = 400) -> Path:
    """A text with some structure: short sentences drawn by a fixed seed."""
    words = random.Random(7)
    names = ["anna", "bob", "cleo", "dan", "eve"]
    verbs = ["sees", "hears", "finds", "loses"]
    things = ["the red ball", "a small bird", "her old hat", "the long road"]
    lines = [f"{words.choice(names)} {words.choice(verbs)} {words.choice(things)}.\n" for _ in range(n_lines)]
    path = folder / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def arguments(data: Path, out: Path, **changes: Any) -> list[str]:
    """The arguments of `fastgpt` for a tiny run; changes use __ for the dot of a key."""
    values = TINY | {"data.source": str(data)} | {key.replace("__", "."): str(value) for key, value in changes.items()}
    return ["train", "--out", str(out), *(part for key, value in values.items() for part in (f"--{key}", value))]


def command(*parts: str | Path) -> list[str]:
    """The command line of `fastgpt`, through this Python."""
    return [sys.executable, "-m", "fastgpt", *map(str, parts)]


def run(*parts: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run `fastgpt` in a process of its own, one thread, and wait for it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(
        command(*parts), capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120, **kwargs
    )
