"""The rungs of examples/ladder: each is a model whose gradient is right and which learns, on a small text in a few steps."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny_run
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "ladder"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import one another by their own names; those are forgotten afterwards, and one thread is enough."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for a second thread
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").is_file():
            del sys.modules[name]


def models(vocab_size: int) -> dict[str, torch.nn.Module]:
    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    one, five = load("step2_one_head"), load("step5_residual_blocks")
    return {
        "bigram": load("step1_bigram").Bigram(vocab_size),
        "one head": one.Model(vocab_size, one.Heads(1)),
        "four heads": one.Model(vocab_size, one.Heads(4)),
        "feed-forward": one.Model(vocab_size, load("step4_feed_forward").body()),
        "residual blocks": one.Model(vocab_size, torch.nn.Sequential(*(five.Block() for _ in range(3)))),
        "layer norm": one.Model(vocab_size, load("step6_layer_norm").body()),
        "gpt": load("step7_side_by_side").gpt(vocab_size),
    }


def test_every_rung_learns(tmp_path: Path) -> None:
    setting = importlib.import_module("setting")
    text = setting.Text(str(tiny_run.text_file(tmp_path)))
    for name, model in models(text.vocab_size).items():
        result = setting.fit(text, lambda model=model: model, steps=60, learning_rate=1e-2, points=2)
        first, last = result["curve"][0][2], result["curve"][-1][2]
        assert last < first - 0.5, (name, first, last)
        assert result["val_loss"] == last
        assert [step for step, _, _ in result["curve"]] == [0, 30, 60]


def test_no_rung_looks_ahead(tmp_path: Path) -> None:
    """A later character changes no earlier loss: the loss of the first half alone is the same."""
    torch.manual_seed(0)
    x, y = torch.randint(20, (4, 8)), torch.randint(20, (4, 8))
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 3) % 20
    head: list[torch.Tensor] = []
    for name, model in models(20).items():
        layer = model.head if hasattr(model, "head") else model.table if name == "bigram" else model.ln_f
        handle = layer.register_forward_hook(lambda layer, given, out: head.append(out.detach().clone()))
        model(x, y)
        model(other, y)
        handle.remove()
        before, after = head[-2:]
        assert before[:, :5].equal(after[:, :5]), name
        assert not before[:, 5:].equal(after[:, 5:]), name


def test_record_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting, plot = importlib.import_module("setting"), importlib.import_module("plot")
    result = {"val_loss": 2.0, "n_params": 5, "seconds": 1.0, "curve": [[0, 4.0, 4.1], [10, 2.0, 2.0]]}
    out = tmp_path / "results.json"
    for name in ("bigram", "init he", "init gpt2", "activation relu", "learning rate 0.1"):
        setting.record(name, result, str(out))
    assert "bigram: validation loss 2.0000" in capsys.readouterr().out
    plot.main(str(out), str(tmp_path))
    for name in ("ladder", "init", "activations", "learning_rates"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
