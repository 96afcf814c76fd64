"""The examples in the docstrings of nn, model and infer run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

from fastgpt.model import GPT, GPTConfig, save_model
from fastgpt.tokenizer import CharTokenizer

MODULES = (
    *("nn.modules", "nn.mlp", "nn.attention"),
    *(
        "model.config",
        "model.gpt",
        "model.init",
        "model.bigram",
        "model.weights",
        "model.rope",
        "model.foreign",
        "model.huggingface",
    ),
    *("infer.sampling", "infer.cache", "infer.generation", "infer.run"),
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some of them write files
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train("the quick brown fox\n")
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=64, n_layer=2, n_head=2, n_embd=16)).eval()
    run = Path("runs/shakespeare")
    run.mkdir(parents=True)
    tokenizer.save(run / "tokenizer.json")
    save_model(model, run / "model.safetensors")
    result = doctest.testmod(
        importlib.import_module(f"fastgpt.{name}"), extraglobs={"model": model, "tokenizer": tokenizer}
    )
    assert result.attempted > 0
    assert result.failed == 0
