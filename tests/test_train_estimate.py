"""Estimates before a run: counted bytes are the real model's, the presets are what they say, the docs table is the code's."""

from pathlib import Path

import pytest
import tiny_run
import torch

from fastgpt.cli import main
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.config import load_config, preset_names
from fastgpt.train.estimate import activation_bytes, count, duration, estimate, plan_rows, share_of
from fastgpt.train.evaluate import autocast
from fastgpt.train.run import model_config

SIZES = {"gpt2-124m": 124_439_808, "gpt2-350m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1.5b": 1_557_611_200}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_the_real_model(dtype: torch.dtype) -> None:
    """The same count on a model with memory, each storage that the graph keeps alive once."""
    config = GPTConfig(vocab_size=300, block_size=32, n_layer=3, n_head=2, n_embd=32)
    model = GPT(config)
    own = {p.data_ptr() for p in model.parameters()}
    idx = torch.randint(300, (4, 32))
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | {idx.untyped_storage().data_ptr()}:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(torch.device("cpu"), dtype):
        model(idx, idx, need_logits=False)
    counted = activation_bytes(config, 4, dtype)
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)
    assert counted > 4 * 32 * 32 * 3 * 4 * 8  # more than eight vectors of the width a token and layer


@pytest.mark.parametrize("preset", SIZES)
def test_gpt2_presets_have_gpt2s_sizes(preset: str) -> None:
    config = load_config(preset=preset)
    assert estimate(model_config(config, 50257), 1, torch.float32).n_params == SIZES[preset]
    assert config.train.batch_size * config.train.grad_accum_steps * config.model.block_size == 491_520


def test_presets_are_known() -> None:
    assert set(SIZES) | {"shakespeare-char", "shakespeare-char-cpu"} <= set(preset_names())


def test_docs_table_is_the_codes() -> None:
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    assert "\n".join(plan_rows(SIZES, [8, 64])) in text


def test_units() -> None:
    assert [count(x) for x in (12, 1234, 5e15)] == ["12 ", "1.23 k", "5 P"]
    assert [duration(x) for x in (1.5, 119, 121, 7200, 200_000)] == [
        "1.5 seconds",
        "119 seconds",
        "2.02 minutes",
        "2 hours",
        "2.31 days",
    ]


def test_units_of_very_long_runs() -> None:
    assert duration(3.2e10) == "1.01e+03 years"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_dry_run_of_several_processes(
    parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone prints, and says what each process of a given number, or of torchrun's, has to hold."""
    asked = [*tiny_run.arguments(tiny_run.text_file(tmp_path), tmp_path / "run"), "--parallel", parallel, "--dry-run"]
    assert main([*asked, "2"]) == 0
    words = capsys.readouterr().out
    vocabulary = len(set((tmp_path / "text.txt").read_text()))
    config = GPTConfig(vocab_size=vocabulary, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=False)
    n, share = GPT(config).n_params(), share_of(config, 2, parallel)
    assert share.state_bytes == (16 * n if parallel == "ddp" else 8 * n)
    assert share.sent_bytes == (4 * n if parallel == "ddp" else 6 * n)
    assert f"memory of each of 2 processes ({parallel})" in words
    total = share.state_bytes + share.gathered_bytes + activation_bytes(config, 2, torch.float32)
    assert f": {count(total)}B (weights, gradients and moments {count(share.state_bytes)}B" in words
    assert f"each sends {count(share.sent_bytes)}B a step" in words
    assert "for one process's 32 tokens" in words
    assert "a step: 64 tokens" in words
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(asked) == 0
    assert f"of each of 2 processes ({parallel})" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(asked) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert main([*asked, "3"]) == 2
    assert "a multiple of the 3 processes" in capsys.readouterr().err
    assert main([*asked, "-1"]) == 2


def test_a_process_of_fsdp_gathers_two_blocks_at_a_time() -> None:
    config = GPTConfig(vocab_size=100, block_size=8, n_layer=4, n_head=2, n_embd=16, bias=False)
    model = GPT(config)
    block = sum(p.numel() for p in model.h[0].parameters())
    outside = sum(p.numel() for module in (model.wte, model.wpe, model.ln_f) for p in module.parameters())
    assert share_of(config, 4, "fsdp").gathered_bytes == 8 * outside + 12 * block
    assert share_of(config, 1, "fsdp").gathered_bytes == 0


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It counts the characters, measures a step, and makes nothing."""
    out = tmp_path / "run"
    assert main([*tiny_run.arguments(tiny_run.text_file(tmp_path), out), "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "measured on cpu" in words
    assert "the run: 12 steps" in words
    text = (tmp_path / "text.txt").read_text()
    assert f"vocabulary: {len(set(text))} (the characters of the text)" in words
    n_params = GPT(
        GPTConfig(vocab_size=len(set(text)), block_size=16, n_layer=2, n_head=2, n_embd=16, bias=False)
    ).n_params()
    assert f"parameters: {n_params:,}\n" in words
    assert not out.exists()
    assert main(["train", "--dry-run", "--resume", str(tmp_path)]) == 2
