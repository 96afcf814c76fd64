"""The loop on a tiny real run: it learns, accumulates right, resumes bit for bit, keeps to its length, and stops when it should."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, text_file

from fastgpt.errors import UserError
from fastgpt.model import load_model
from fastgpt.train import Trainer, load_config, open_run, start_run
from fastgpt.train.checkpoint import latest_checkpoint, read_state

COUNTER = itertools.count()


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def new_run(tmp_path: Path, **changes: object):
    overrides = TINY | {key.replace("__", "."): str(value) for key, value in changes.items()}
    overrides.setdefault("data.source", str(text_file(tmp_path)))
    return start_run(load_config(overrides=overrides), tmp_path / f"run{next(COUNTER)}", quiet)


def steps_of(trainer: Trainer, stop_after: int | None = None) -> list[float]:
    """Have the trainer note every step's loss, and ask it to stop after `stop_after` steps as Ctrl-C would."""
    losses: list[float] = []
    step = trainer._step

    def noted(learning_rate: float) -> float | None:
        loss = step(learning_rate)
        losses.append(math.nan if loss is None else loss)
        if stop_after is not None and len(losses) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    trainer._step = noted  # type: ignore[method-assign]
    return losses


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_whole_run_folder(tmp_path):
    run = new_run(tmp_path, train__max_steps=300, train__eval_interval=100, model__n_embd=32)
    trainer = Trainer(run, quiet)
    outcome = trainer.fit()
    summary = trainer.finish()
    assert outcome.status == "finished"
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        *("config.yaml", "tokenizer.json", "data", "checkpoints"),
        *("model.safetensors", "metrics.jsonl", "loss.png", "summary.json"),
    }
    got = lines(run)
    assert [line["step"] for line in got] == [0, 100, 200, 300]
    assert got[0]["val_loss"] == pytest.approx(math.log(run.tokenizer.n_vocab), abs=0.2)
    assert got[-1]["val_loss"] < got[-1]["bigram_val_loss"]
    assert got[-1]["tokens_per_s"] > 0
    assert summary["val_loss"] < summary["bigram_val_loss"]
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["latest", "step-000200", "step-000300"]


def test_the_best_weights_are_what_is_kept(tmp_path):
    run = new_run(tmp_path, train__max_steps=40, train__eval_interval=10)
    trainer = Trainer(run, quiet)
    trainer.fit()
    best = min(lines(run), key=lambda line: line["val_loss"])
    model = load_model(run.folder / "model.safetensors")
    from fastgpt.train.evaluate import mean_loss

    assert mean_loss(model, trainer.eval_val, trainer.device, trainer.dtype) == best["val_loss"]
    assert (trainer.state.best_step, trainer.state.best_loss) == (best["step"], best["val_loss"])


def test_accumulation_is_the_larger_batch(tmp_path):
    """Two micro steps of 4 see the text of one step of 8 and give the same gradient, up to the order of sums."""
    data = text_file(tmp_path)
    first = {}
    for batch_size, accum in ((8, 1), (4, 2)):
        changes = {"train__batch_size": batch_size, "train__grad_accum_steps": accum, "data__source": data}
        trainer = Trainer(new_run(tmp_path, train__grad_clip=0, **changes), quiet)
        x = torch.cat([trainer.loader.batch(3, micro, accum)[0] for micro in range(accum)])
        trainer.optimizer.step = lambda grad_scale: None
        trainer.optimizer.zero_grad = lambda set_to_none: None
        loss = trainer._step(0.0)
        first[accum] = loss, [p.grad.clone() for p in trainer.model.parameters()], x.shape
    assert first[1][2] == first[2][2] == (8, 16)
    # Batches of 4 come from other draws than one of 8, so compare on the same text: feed it by hand.
    trainer = Trainer(new_run(tmp_path, train__grad_clip=0, train__grad_accum_steps=2, data__source=data), quiet)
    parts = [trainer.loader.batch(0, micro, 2) for micro in range(2)]
    _, loss = trainer.model(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    loss.backward()
    assert first[2][0] == pytest.approx(loss.item(), rel=1e-6)
    for accumulated, parameter in zip(first[2][1], trainer.model.parameters(), strict=True):
        torch.testing.assert_close(accumulated, parameter.grad, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_gradient(tmp_path):
    trainer = Trainer(new_run(tmp_path, train__grad_clip=0.01), quiet)
    norms = []
    step = trainer.optimizer.step

    def noted(grad_scale):
        norms.append(grad_scale * torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())
        return step(grad_scale=grad_scale)

    trainer.optimizer.step = noted
    trainer._step(1e-3)
    assert norms[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("stop_after", [1, 5, 8, 11])
def test_ctrl_c_and_resume_repeat_the_uninterrupted_run_bit_for_bit(tmp_path, stop_after):
    """Dropout draws random numbers at each step, so this covers weights, moments, random state, text and learning rate."""
    data = text_file(tmp_path)
    changes = {"model__dropout": 0.1, "data__source": data}
    whole = Trainer(new_run(tmp_path, **changes), quiet)
    expected = steps_of(whole)
    whole.fit()

    run = new_run(tmp_path, **changes)
    trainer = Trainer(run, quiet)
    losses = steps_of(trainer, stop_after)
    outcome = trainer.fit()
    assert outcome.status == "interrupted"
    assert outcome.signal == signal.SIGINT
    assert f"fastgpt train --resume {run.folder}" in outcome.message
    assert len(losses) == stop_after

    torch.manual_seed(999)  # a new process would not have this one's random state
    (run.folder / ".model.safetensors.abc.tmp").write_bytes(b"what a kill leaves")
    trainer = Trainer(open_run(run.folder, [], {}), quiet)
    rest = steps_of(trainer)
    assert trainer.fit().status == "finished"
    assert not list(run.folder.glob(".*"))
    assert losses + rest == expected
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(whole), strict=True))
    timeless = ("step", "train_loss", "val_loss", "lr")
    assert [[line[key] for key in timeless] for line in lines(run)] == [
        [line[key] for key in timeless] for line in lines(whole.run)
    ]


def test_a_resume_from_an_older_checkpoint_repeats_too(tmp_path):
    """A kill between two checkpoints: steps and metrics after the last checkpoint are done again."""
    data = text_file(tmp_path)
    whole = Trainer(new_run(tmp_path, data__source=data), quiet)
    whole.fit()
    expected = lines(whole.run)
    newest = latest_checkpoint(whole.run.folder)
    assert newest.name == "step-000012"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    trainer = Trainer(open_run(whole.run.folder, [], {}), quiet)
    assert trainer.state.step == 8
    trainer.fit()
    assert [line["val_loss"] for line in lines(whole.run)] == [line["val_loss"] for line in expected]
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), weights(whole), strict=True))


def test_a_resume_from_step_0_repeats_too(tmp_path):
    """A kill before the second checkpoint: what was measured at step 0 is neither measured nor counted again."""
    run = new_run(tmp_path)
    trainer = Trainer(run, quiet)
    steps_of(trainer, stop_after=1)
    trainer.fit()
    shutil.rmtree(run.folder / "checkpoints" / "step-000001")
    resumed = Trainer(open_run(run.folder, [], {}), quiet)
    assert resumed.state.step == 0
    resumed.fit()
    assert [line["step"] for line in lines(run)] == [0, 4, 8, 12]
    whole = Trainer(new_run(tmp_path, data__source=tmp_path / "text.txt"), quiet)
    whole.fit()
    assert [line["val_loss"] for line in lines(run)] == [line["val_loss"] for line in lines(whole.run)]
    assert resumed.state.evals_without_better == whole.state.evals_without_better


def test_epochs_become_steps(tmp_path):
    run = new_run(tmp_path, train__epochs=0.25, train__max_steps="none", train__eval_interval=1000)
    trainer = Trainer(run, quiet)
    assert trainer.fit().state.step == math.ceil(trainer.loader.n_blocks * 0.25 / 4)


def test_a_time_budget_becomes_steps_once_and_a_resume_keeps_them(tmp_path):
    run = new_run(tmp_path, train__time_budget_s=4, train__max_steps="none", train__eval_interval="none")
    trainer = Trainer(run, quiet)
    started = time.monotonic()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    outcome = trainer.fit()
    assert outcome.status == "interrupted"
    planned = outcome.state.max_steps
    assert planned is not None
    assert planned > outcome.state.step
    assert read_state(latest_checkpoint(run.folder)).max_steps == planned
    resumed = Trainer(open_run(run.folder, [], {}), quiet)
    assert resumed.state.max_steps == planned
    assert resumed.state.eval_interval == outcome.state.eval_interval
    assert resumed.fit().state.step == planned
    assert time.monotonic() - started < 20
    assert trainer._schedule() == resumed._schedule()


def test_a_budget_shorter_than_a_measurement_still_ends(tmp_path):
    run = new_run(tmp_path, train__time_budget_s=1e-6, train__max_steps="none", train__eval_interval="none")
    outcome = Trainer(run, quiet).fit()
    assert outcome.status == "finished"
    assert outcome.state.step == outcome.state.max_steps == 1


def test_more_steps_can_be_asked_for_on_a_resume(tmp_path):
    run = new_run(tmp_path, train__max_steps=4)
    Trainer(run, quiet).fit()
    assert Trainer(open_run(run.folder, [], {}), quiet).fit().state.step == 4
    assert Trainer(open_run(run.folder, [], {"train.max_steps": "6"}), quiet).fit().state.step == 6
    assert Trainer(open_run(run.folder, [], {}), quiet).state.max_steps == 6


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.n_layer", "3"), ("model.n_embd", "32"), ("data.source", "stdlib"), ("tokenizer.type", "bpe")],
)
def test_a_resume_cannot_become_another_run(tmp_path, key, value):
    run = new_run(tmp_path)
    before = (run.folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"{key} is '?{value}'?, but the run"):
        open_run(run.folder, [], {key: value})
    assert (run.folder / "config.yaml").read_text() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    small, large = new_run(tmp_path), new_run(tmp_path, model__n_embd=32, data__source=tmp_path / "text.txt")
    Trainer(small, quiet).fit()
    os.rename(small.folder / "checkpoints", large.folder / "checkpoints")
    with pytest.raises(UserError, match="n_embd"):
        Trainer(large, quiet)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, what, monkeypatch):
    run = new_run(tmp_path)
    trainer = Trainer(run, quiet)
    forward = trainer.model.forward

    def broken(x, y, **options):
        logits, loss = forward(x, y, **options)
        if trainer.model.training and trainer.state.step == 5:
            loss = loss * math.nan if what == "loss" else (loss - loss.detach()) * math.inf + 1.0
        return logits, loss

    monkeypatch.setattr(trainer.model, "forward", broken)
    outcome = trainer.fit()
    assert outcome.status == "diverged"
    assert "at step 6 " in outcome.message
    assert str(run.folder / "checkpoints" / "step-000004") in outcome.message
    assert all(torch.isfinite(weight).all() for weight in weights(trainer))
    assert read_state(latest_checkpoint(run.folder)).step == 4


def test_patience_stops_and_says_that_training_and_validation_part_ways(tmp_path, capsys):
    data = tmp_path / "short.txt"
    letters = __import__("random").Random(3)
    data.write_text("".join(letters.choice("abcdefgh") for _ in range(220)))  # nothing to learn but by heart
    run = new_run(
        tmp_path,
        data__source=data,
        model__n_embd=64,
        train__max_steps=2000,
        train__eval_interval=20,
        train__patience=4,
        train__batch_size=8,
    )
    trainer = Trainer(run, quiet)
    outcome = trainer.fit()
    assert outcome.status == "patience"
    assert outcome.state.step == outcome.state.best_step + 4 * 20 < 2000
    assert "has not improved for 4 evaluations" in outcome.message
    shown = capsys.readouterr().err
    assert shown.count("training and validation part ways") == 1
    assert "learning its training text by heart" in shown
    assert Trainer(open_run(run.folder, [], {}), quiet).fit().status == "patience"
    assert Trainer(open_run(run.folder, [], {"train.patience": "5"}), quiet).fit().status == "patience"
    assert read_state(latest_checkpoint(run.folder)).step == outcome.state.best_step + 5 * 20


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path):
    run = new_run(tmp_path, train__dtype="bfloat16", train__max_steps=60, train__eval_interval=30)
    trainer = Trainer(run, quiet)
    trainer.fit()
    got = lines(run)
    assert got[-1]["val_loss"] < got[0]["val_loss"] - 0.5
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    seen = []
    trainer.model.register_forward_hook(
        lambda module, inputs, output: seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    )
    trainer._step(1e-3)
    assert seen == [torch.bfloat16]
