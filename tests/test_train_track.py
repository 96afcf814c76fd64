"""Trackers get the numbers of metrics.jsonl, are told where a resume begins, and never end a run."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, arguments, text_file

from fastgpt.cli import main
from fastgpt.errors import UserError
from fastgpt.finetune.loop import fit
from fastgpt.finetune.options import load_options
from fastgpt.finetune.recipe import Recipe
from fastgpt.train import Trainer, load_config, open_run, start_run
from fastgpt.train.metrics import Metrics
from fastgpt.train.track import TRACKERS, Tracking, tracker_names


class Recorder:
    """Stands in the place of a tracker's module: takes down every call; raises at `log` number `fails_at`."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.fails_at = fails_at

    def init(self, **options: object) -> "Recorder":
        self.started.append(options)
        return self

    def log(self, values: dict, step: int) -> None:
        if len(self.logged) == self.fails_at:
            raise OSError("the network is gone\nsecond line")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def module(monkeypatch):
    """Puts a Recorder in the place of a tracker's module."""

    def place(name: str, recorder: Recorder) -> Recorder:
        fake = types.ModuleType(name)
        fake.__spec__ = types.SimpleNamespace(name=name)  # find_spec looks here
        for attribute in ("init", "log", "finish"):
            setattr(fake, attribute, getattr(recorder, attribute))
        monkeypatch.setitem(sys.modules, name, fake)
        return recorder

    return place


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_metrics_has_a_tracker_gets(tmp_path, module, name):
    recorder = module(name, Recorder())
    config = load_config(overrides=TINY | {"data.source": str(text_file(tmp_path)), "train.track": name})
    run = start_run(config, tmp_path / "run", print)
    Trainer(run, print).fit()
    written = lines(run.folder)
    assert [(line.pop("step"), line) for line in written] == recorder.logged
    assert [step for step, _ in recorder.logged] == [0, 4, 8, 12]
    assert recorder.finished == 1
    Trainer(open_run(run.folder, [], {"train.max_steps": "16"}), print).fit()
    assert [step for step, _ in recorder.logged] == [0, 4, 8, 12, 16]
    first, second = recorder.started
    assert first["name"] == "run"
    assert first["project"] == "fastgpt"
    assert first["config"]["model.n_embd"] == 16
    assert first.get("id") == second.get("id")  # wandb's name for it: the same run goes on
    assert second["resume"] == "allow"


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, module, capsys):
    broken, sound = module("wandb", Recorder(fails_at=2)), module("trackio", Recorder())
    code = main(arguments(text_file(tmp_path), tmp_path / "run", train__track="wandb,trackio"))
    assert code == 0
    said = capsys.readouterr().err
    assert said.count("note: wandb has failed and is left out from here (the network is gone); metrics.jsonl has") == 1
    assert len(broken.logged) == 2
    assert len(sound.logged) == len(lines(tmp_path / "run")) == 4


def test_one_that_does_not_start_or_is_not_there_is_known_before_training(tmp_path, module, monkeypatch):
    fake = module("wandb", Recorder())
    fake.started = None  # so that init fails
    with pytest.raises(UserError, match=r"--track: wandb does not start: 'NoneType' object has no attribute"):
        Tracking(["wandb"], tmp_path, {}, 0, print)
    monkeypatch.setattr("fastgpt.train.track.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio is not installed; pip install 'fastgpt-kernels\[trackio\]'"):
        load_config(overrides={"train.track": "trackio"})
    with pytest.raises(UserError, match=r"--track is 'wnadb'; accepted are tensorboard, trackio, wandb"):
        load_config(overrides={"train.track": "wnadb"})
    assert tracker_names("") == []
    assert set(TRACKERS) == {"tensorboard", "trackio", "wandb"}


def test_tensorboard_writes_events_that_it_reads_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(arguments(text_file(tmp_path), tmp_path / "run", train__track="tensorboard")) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "16"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert [step for step, _ in found] == [0, 4, 8, 12, 16]
    assert [value for _, value in found] == pytest.approx([line["val_loss"] for line in lines(tmp_path / "run")])


def test_a_tracker_gets_what_fine_tuning_measures(tmp_path, module):
    recorder = module("trackio", Recorder())
    model = torch.nn.Linear(3, 1)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    fit(
        model,
        [1] * 8,
        lambda batch: (model(x[batch]) - y[batch]).square().mean(),
        lambda: {"val_loss": (model(x) - y).square().mean().item()},
        lambda line: None,
        Recipe(epochs=2, batch_size=4, track="trackio"),
        Metrics(tmp_path / "metrics.jsonl"),
        torch.float32,
    )
    assert [(line.pop("step"), line) for line in lines(tmp_path)] == recorder.logged
    assert [step for step, _ in recorder.logged] == [2, 4]
    assert recorder.finished == 1
    assert recorder.started[0]["config"]["batch_size"] == 4
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--track is 'trackoi'"):
        load_options(None, {"track": "trackoi"})
