"""A fine-tuning that is stopped goes on exactly; what cannot be gone on with is refused; starts from other libraries' models."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import kill_finetuning
import pytest

from fastgpt import GPT, GPTConfig, cli
from fastgpt.errors import UserError
from fastgpt.finetune import loop
from fastgpt.finetune.recipe import CHECKPOINT
from fastgpt.infer import load_run
from fastgpt.infer.run import load_pretrained
from fastgpt.model import load_model, save_gguf
from fastgpt.train.metrics import Metrics

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from kill_finetuning import storm
print(storm(Path(sys.argv[1]), sys.argv[3], 4, epochs=20, seed=3).kills)
"""


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(loop, "plot_losses", lambda *arguments: None)


@pytest.fixture
def made(tmp_path):
    return kill_finetuning.make_base(tmp_path)


def _stopped(monkeypatch, made, out, kind, step, number=signal.SIGINT):
    """A run that gets a signal in its step `step`; the exit code."""
    base, data = made
    update = loop.update

    def signalled(optimizer, *arguments):
        done = update(optimizer, *arguments)
        if optimizer.steps == step:
            os.kill(os.getpid(), number)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", signalled)
        return cli.main(kill_finetuning.arguments(base, data[kind], out, kind, epochs=4, interval=4))


@pytest.mark.parametrize(("kind", "step"), [("lora", 3), ("packed", 9), ("classify", 7)])
def test_ctrl_c_and_resume_repeat_the_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch, capfd, made, kind, step):
    base, data = made
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(kill_finetuning.arguments(base, data[kind], whole, kind, epochs=4)) == 0
    assert _stopped(monkeypatch, made, run, kind, step) == 130
    assert f"stopped after step {step}; a checkpoint is written" in capfd.readouterr().err
    assert not (run / "summary.json").exists()
    for name in (".model.safetensors.abc.tmp", ".tmp5MDgPg"):
        (run / name).write_bytes(b"what a kill leaves")
    assert cli.main(["finetune", "--resume", str(run)]) == 0
    kill_finetuning.compare(whole, run)
    assert not (run / CHECKPOINT).exists()


@pytest.mark.parametrize("kind", ["lora", "classify"])
def test_killed_four_times_a_run_ends_as_one_that_was_not(tmp_path, kind):
    """In a process of its own: it forks, which the threads of other tests would not survive."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(Path(__file__).parent), kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4"


def test_what_a_resume_refuses(tmp_path, monkeypatch, capsys, made):
    base, data = made
    run = tmp_path / "run"
    assert _stopped(monkeypatch, made, run, "classify", 6, signal.SIGTERM) == 143
    checkpoint, options = (run / CHECKPOINT).read_bytes(), (run / "options.json").read_bytes()
    other = tmp_path / "other.tsv"
    other.write_bytes(data["classify"].read_bytes() + b"\nblue\tmore")
    cases = [
        ([base, "--resume", run], "leave out"),
        (["--resume", run, "--epochs", "9"], "--epochs cannot change on a resume"),
        (["--resume", run, "--data", other], "is not the file that"),
        (["--resume", base], "it has no options.json"),
        ([base, "--data", data["classify"], "--task", "classify", "--out", run], f"--resume {run} goes on with it"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        assert cli.main(["finetune", *map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    damages = {
        CHECKPOINT: (checkpoint[:-1] + bytes([checkpoint[-1] ^ 1]), "is damaged: the content of"),
        f"{CHECKPOINT} cut": (checkpoint[:1000], "is damaged"),
        "options.json": (options[:20], "is damaged"),
    }
    for name, (content, message) in damages.items():
        (run / name.split()[0]).write_bytes(content)
        assert cli.main(["finetune", "--resume", str(run)]) == 2, name
        assert message in capsys.readouterr().err, name
        (run / CHECKPOINT).write_bytes(checkpoint)
        (run / "options.json").write_bytes(options)
    data["classify"].rename(tmp_path / "moved.tsv")
    assert cli.main(["finetune", "--resume", str(run)]) == 2
    assert "--data names their new place" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", str(run), "--data", str(tmp_path / "moved.tsv")]) == 0
    assert cli.main(["finetune", "--resume", str(run)]) == 2
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["packed", "classify"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys, made, kind):
    base, data = made
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(kill_finetuning.arguments(base, data[kind], whole, kind, epochs=3)) == 0
    append = Metrics.append

    def full(self, line):
        if line["epoch"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "append", full)
        assert cli.main(kill_finetuning.arguments(base, data[kind], run, kind, epochs=3)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no disk space left" in error
    assert f"--resume {run}" in error
    assert cli.main(["finetune", "--resume", str(run)]) == 0
    kill_finetuning.compare(whole, run)


def test_a_start_that_fails_leaves_no_folder(tmp_path, capsys, made):
    base, data = made
    arguments = kill_finetuning.arguments(base, data["packed"], tmp_path / "run", "packed", epochs=1)
    long = tmp_path / "long.json"
    long.write_text(json.dumps([{"instruction": "sky " * 200, "output": "blue"}] * 5))
    arguments[3] = str(long)
    assert cli.main(arguments) == 2
    assert "no answer begins within" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lora", "classify"])
@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_another_librarys_model_is_gone_on_with(tmp_path, made, kind, form):
    base, data = made
    _, tokenizer = load_run(base)
    shape = {"block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 32, "norm": "rms_norm", "position": "rope"}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **shape, activation="swiglu", bias=False))
    source = tmp_path / ("model.gguf" if form == "gguf" else "folder")
    if form == "gguf":
        pytest.importorskip("gguf")
        save_gguf(gpt, source, tokenizer=tokenizer)
    else:
        gpt.save_pretrained(source, tokenizer)
    model, read = load_pretrained(source)
    assert read.encode_ordinary("the colour of coal") == tokenizer.encode_ordinary("the colour of coal")
    assert all((one == two).all() for one, two in zip(model.parameters(), gpt.parameters(), strict=True))
    run = tmp_path / "run"
    assert cli.main(kill_finetuning.arguments(source, data[kind], run, kind, epochs=2)) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["val_loss"] < lines[0]["val_loss"]
    if kind == "lora":
        assert load_model(run / "model.safetensors").config.position == "rope"


def test_models_without_a_tokenizer_are_refused(tmp_path, made):
    base, _ = made
    with pytest.raises(UserError, match="has no tokenizer"):
        load_pretrained(base / "model.safetensors")
    load_run(base)[0].save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="its tokenizer"):
        load_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no such folder"):
        load_pretrained(tmp_path / "nowhere")
