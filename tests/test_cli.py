"""The command line as a user meets it: help, training, Ctrl-C, a kill, resume, sampling; each in a process of its own."""

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import arguments, command, run, text_file

from fastgpt import __version__
from fastgpt.cli import COMMANDS, main
from fastgpt.train.command import train_parser
from fastgpt.train.config import options, preset_names

LEFT_OPEN = {"train__max_steps": 100_000, "train__eval_interval": 50, "train__checkpoint_interval": 5}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_help_is_fast_because_torch_stays_out():
    code = (
        "import sys, fastgpt.cli; from fastgpt.train.command import train_parser; train_parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_train_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for key, item in options():
        start = shown.index(f"--{key} ", shown.index("options:"))
        text = shown[start : shown.index("(default: ", start) + 60]
        assert item.metadata["help"][:30] in text, key
    defaults = re.findall(r"\(default: ([^)]*)\)", shown)
    assert len(defaults) == len(list(options())) + 5  # and --preset, --config, --out, --resume, --dry-run
    for name in preset_names():
        assert name in shown


@pytest.mark.parametrize("name", ["train", "sample", "info"])
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: fastgpt {name}" in capsys.readouterr().out


def test_sample_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option, default in (
        ("max-new-tokens", 200),
        ("temperature", 0.8),
        ("top-k", 50),
        ("top-p", 0.95),
        ("seed", "none"),
        ("prompt", "none"),
    ):
        assert re.search(rf"--{option} \w+ [^()]*\(default: {default}\b", shown), option


def test_short_and_dotted_names_are_the_same_option():
    parser = train_parser()
    short = parser.parse(["--data", "x", "--max-steps", "3", "--n-layer", "2", "--tokenizer", "char", "--bias", "true"])
    dotted = parser.parse(
        [
            "--data.source",
            "x",
            "--train.max_steps=3",
            "--model.n_layer",
            "2",
            "--tokenizer.type",
            "char",
            "--model.bias",
            "true",
        ]
    )
    assert short == dotted


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fastgpt {__version__}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished tiny run and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    out = folder / "run"
    done = run(
        *arguments(text_file(folder), out, train__max_steps=60, train__eval_interval=20, train__sample_tokens=30)
    )
    return out, done


def test_train_prints_both_losses_and_a_sample(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"validation loss ([\d.]+) .*bigram baseline ([\d.]+) .*same ([\d,]+) held-out tokens", done.stdout
    )
    summary = json.loads((out / "summary.json").read_text())
    assert float(found[1]) == pytest.approx(summary["val_loss"], abs=1e-4)
    assert float(found[2]) == pytest.approx(summary["bigram_val_loss"], abs=1e-4)
    assert f"run folder: {out}\nsample:\n" in done.stdout
    assert len(done.stdout.split("sample:\n")[1]) >= 20
    assert "\r" not in done.stderr  # no bar where there is no terminal
    for line in lines(out):
        assert {"step", "train_loss", "val_loss", "tokens_per_s"} <= set(line)


def test_sample_is_repeatable_and_differs_between_seeds(finished, capsys):
    out, _ = finished
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert main(["sample", str(out), "--prompt", "anna", "--max-new-tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    first, again, other = texts
    assert first.startswith("anna")
    assert len(first) == len("anna") + 40 + 1
    assert first == again
    assert first != other
    done = run("sample", out, "--prompt", "anna", "--max-new-tokens", "40", "--seed", "1")
    assert done.stdout == first  # also in a process of its own


def test_sample_into_a_closed_pipe_ends_quietly(finished):
    out, _ = finished
    process = subprocess.Popen(
        command("sample", out, "--max-new-tokens", "2000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


def start(tmp_path: Path, name: str, data: Path, **changes: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments(data, tmp_path / name, **changes)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Until `path` is there; fails where the process ends before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_and_prints_the_command_that_goes_on(tmp_path, number):
    data = text_file(tmp_path)
    process = start(tmp_path, "a run", data, **LEFT_OPEN)
    wait_for(tmp_path / "a run" / "checkpoints" / "step-000010", process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    last = errors.splitlines()[-1]
    step = int(re.search(r"stopped after step ([\d,]+);", last)[1].replace(",", ""))
    assert (tmp_path / "a run" / "checkpoints" / "latest").read_text() == f"step-{step:06d}\n"
    asked = last.split("To go on: fastgpt ")[1]
    again = run(*shlex.split(asked), "--train.max_steps", step + 3)
    assert again.returncode == 0, again.stderr
    assert f"finished after {step + 3:,} steps" in again.stderr


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_run_and_resume_reach_the_same_weights(tmp_path):
    """Killed twice at some moment, a run still ends with the same losses and the same weights as one left alone."""
    data = text_file(tmp_path)
    changes = {
        "train__max_steps": 300,
        "train__eval_interval": 100,
        "train__checkpoint_interval": 9,
        "model__dropout": 0.1,
    }
    whole = start(tmp_path, "whole", data, **changes)
    assert whole.wait(120) == 0, whole.stderr.read()

    killed = tmp_path / "killed"
    process = start(tmp_path, "killed", data, **changes)
    for target in ("step-000018", "step-000153"):
        step = int(target[5:])
        end = time.monotonic() + 60
        while not any(int(p.name[5:]) >= step for p in (killed / "checkpoints").glob("step-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
        time.sleep(0.0137)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process = subprocess.Popen(
            command("train", "--resume", killed),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resuming from" in errors
    timeless = ("step", "train_loss", "val_loss", "lr")
    one, other = ([[line[key] for key in timeless] for line in lines(tmp_path / name)] for name in ("whole", "killed"))
    assert one == other
    for name in ("model.safetensors", "checkpoints/step-000300/training.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(killed / name)
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_run_folder_gets_the_next_free_number(tmp_path):
    data = text_file(tmp_path)
    given = arguments(data, Path("x"), train__max_steps=1)
    place = given.index("--out")
    del given[place : place + 2]
    for number in (1, 2):
        done = run(*given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"run folder: runs/text-{number}\n" in done.stdout


def test_a_log_file_gets_lines_not_a_bar(tmp_path, monkeypatch, capsys):
    from fastgpt.train import progress

    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    assert main(arguments(text_file(tmp_path), tmp_path / "run")) == 0
    shown = capsys.readouterr().err
    found = re.search(r"^step 6 of 12: loss \d+\.\d{4}, [\d,]+ tokens/s, 0:0\d left$", shown, re.MULTILINE)
    assert found, shown


def test_a_terminal_gets_a_bar(tmp_path):
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        command(*arguments(text_file(tmp_path), tmp_path / "run", train__max_steps=300)),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(60) == 0
    assert re.search(rb"\d+/300 \[.*loss \d+\.\d{4}, [\d,]+ tokens/s", shown), shown[-2000:]


def test_a_nan_ends_with_exit_code_1(tmp_path):
    """A learning rate of 1e30 is allowed, and no model survives it."""
    out = tmp_path / "run"
    done = run(
        *arguments(text_file(tmp_path), out, train__learning_rate=1e30, train__warmup_steps=6, train__grad_clip=0),
        "--weight-decay=0",
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"fastgpt: error: the loss is no longer a finite number at step \d+ ", last), last
    assert f"the last good checkpoint is {out}/checkpoints/step-00000" in last


def test_python_minus_m_runs_the_same_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastgpt", "no-such-command"])
    assert main() == 2
    assert "unknown command 'no-such-command'" in capsys.readouterr().err
    assert tiny_run.command("x")[1:3] == ["-m", "fastgpt"]
