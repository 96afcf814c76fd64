"""kill -9 at random moments of fine-tuning, as tests/kill_training.py does it to training.

    python tests/kill_finetuning.py 50        # that many kills of each kind, a summary in the end

An attempt goes on by the run folder, or begins where the one before was killed too early to have left one. It writes a checkpoint
every second step.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch
from kill_training import LONGEST_S, STARTING_SHARE, Summary, attempt
from safetensors import safe_open
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, Tokenizer, cli
from fastgpt.finetune import loop
from fastgpt.finetune.recipe import CHECKPOINT
from fastgpt.model import save_model

COLOURS = {"sky": "blue", "grass": "green", "sun": "yellow", "coal": "black"}
KINDS = {
    "lora": ["--lora-rank", "4", "--lora-dropout", "0.1"],
    "packed": ["--packing", "true"],
    "classify": ["--task", "classify"],
}


def make_base(place: Path) -> tuple[Path, dict[str, Path]]:
    """A run folder with a tiny untrained model, and data for each kind."""
    base = place / "base"
    base.mkdir()
    texts = [f"what is the colour of the {thing}? {colour}" for thing, colour in COLOURS.items()]
    tokenizer = Tokenizer.train([" ".join(texts * 10)], 280)
    tokenizer.save(base / "tokenizer.json")
    torch.manual_seed(0)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    save_model(GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape)), base / "model.safetensors")
    questions = [f"what is the colour of the {thing}?" for thing in COLOURS]
    records = [
        {"instruction": question, "output": colour}
        for question, colour in zip(questions, COLOURS.values(), strict=True)
    ]
    (place / "chat.json").write_text(json.dumps(records * 10))
    lines = [f"{colour}\tthe {thing} {number} is {colour}" for thing, colour in COLOURS.items() for number in range(12)]
    (place / "classes.tsv").write_text("\n".join(lines))
    return base, {kind: place / ("classes.tsv" if kind == "classify" else "chat.json") for kind in KINDS}


def arguments(base: Path, data: Path, out: Path, kind: str, *, epochs: int, interval: int = 2) -> list[str]:
    """Those of `fastgpt finetune`."""
    settings = f"--epochs {epochs} --batch-size 8 --dtype float32 --threads 1 --checkpoint-interval {interval}".split()
    return ["finetune", str(base), "--data", str(data), "--out", str(out), *settings, *KINDS[kind]]


def compare(whole: Path, other: Path) -> None:
    """Raises AssertionError unless two finished runs have the same files, losses and weights."""
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (whole, other)]
    assert names[0] == names[1], names
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, other)]
    for one, two in zip(*lines, strict=True):
        assert {key: one[key] for key in one if key not in ("elapsed_s", "tokens_per_s")} == {
            key: two[key] for key in two if key not in ("elapsed_s", "tokens_per_s")
        }
    for path in whole.rglob("*.safetensors"):
        one, two = load_file(path), load_file(other / path.relative_to(whole))
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one), path.name


def _saved_step(folder: Path) -> int:
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return json.loads(file.metadata()["state"])["step"]


def storm(place: Path, kind: str, kills: int, *, epochs: int, seed: int) -> Summary:
    """Kill a fine-tuning `kills` times, let it end, and compare it with a whole one.

    Raises:
        AssertionError: something was lost, or the run did not go on.
    """
    draw = random.Random(seed)
    base, data = make_base(place)
    begin = {name: arguments(base, data[kind], place / name, kind, epochs=epochs) for name in ("whole", "killed")}

    def train(folder: Path, pipe: int) -> None:
        save, update = loop.save_state, loop.update
        loop.plot_losses = lambda *arguments: None  # a picture takes longer than all else

        def told(path, model, optimizer, state):
            save(path, model, optimizer, state)
            os.write(pipe, f"saved {state['step']}\n".encode())

        def counted(optimizer, *arguments):
            done = update(optimizer, *arguments)
            os.write(pipe, f"step {optimizer.steps}\n".encode())
            return done

        loop.save_state, loop.update = told, counted
        begun = (folder / "options.json").is_file()
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        if code := cli.main(["finetune", "--resume", str(folder)] if begun else begin[folder.name]):
            os._exit(code)

    status, _ = attempt(place / "whole", None, work=train)
    assert status == 0
    summary, folder = Summary(), place / "killed"
    while summary.kills < kills:
        training = draw.random() > STARTING_SHARE
        status, told = attempt(folder, draw.random() * LONGEST_S, training=training, work=train)
        assert status == signal.SIGKILL, f"ended with status {status} after {summary.kills} kills: {told[-3:]}"
        summary.kills += 1
        saved, steps = ([int(line.split()[1]) for line in told if line.startswith(word)] for word in ("saved", "step"))
        summary.while_writing += (folder / f".{CHECKPOINT}.tmp").exists()
        if not (folder / CHECKPOINT).is_file():
            assert not saved
            summary.before_first += 1
            continue
        step = _saved_step(folder)
        assert step >= max(saved, default=0)
        summary.steps_lost += max([*steps, step]) - step
    status, _ = attempt(folder, None, work=train)
    assert status == 0
    (place / "whole/loss.png").unlink(missing_ok=True)
    (folder / "loss.png").unlink(missing_ok=True)
    compare(place / "whole", folder)
    return summary


if __name__ == "__main__":
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as place:
            print(kind, storm(Path(place), kind, int(sys.argv[1]), epochs=8 * int(sys.argv[1]), seed=1), flush=True)
