"""model.safetensors: what is saved loads again in a fresh process, and every way a file can be wrong has its one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig, load_model, load_weights, read_config, save_model

SHAPE = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, dropout=0.1, activation="silu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def saved(model: GPT, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    return path


def test_loads_again_the_same(model: GPT, saved: Path) -> None:
    loaded = load_model(saved)
    assert loaded.config == model.config
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    idx = torch.randint(31, (2, 16))
    assert torch.equal(loaded(idx)[0], model.eval()(idx)[0])


def test_loads_the_same_in_a_fresh_process(model: GPT, saved: Path) -> None:
    code = (
        "import sys, torch; from fastgpt.model import load_model\n"
        "print(load_model(sys.argv[1])(torch.arange(16)[None])[0].double().flatten().tolist())"
    )
    # The same package as here, whether it is installed or a checkout.
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parent.parent)}
    out = subprocess.run(
        [sys.executable, "-c", code, saved], capture_output=True, text=True, check=True, env=environment
    )
    want = model.eval()(torch.arange(16)[None])[0].double().flatten().tolist()
    assert json.loads(out.stdout) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_loaded_model_trains(saved: Path) -> None:
    loaded = load_model(saved).train()
    before = loaded.wte.weight.clone()
    idx = torch.randint(31, (2, 16))
    loaded(idx, idx)[1].backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(loaded.wte.weight, before)


def test_the_file_is_what_it_is_documented_to_be(model: GPT, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "fastgpt-gpt"
    assert GPTConfig.from_dict(json.loads(metadata["config"])) == model.config
    assert sum(t.numel() for t in load_file(saved).values()) == model.n_params()  # the tied head once
    assert read_config(saved) == model.config
    assert os.listdir(saved.parent) == [saved.name]
    umask = os.umask(0)
    os.umask(umask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_run_folder_stands_for_its_weights(model: GPT, saved: Path) -> None:
    assert load_model(saved.parent).config == model.config


def test_bf16_weights_stay_bf16(model: GPT, tmp_path: Path) -> None:
    save_model(model.to(torch.bfloat16), tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.wpe.weight, model.wpe.weight)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:keep])
    for read in (load_model, read_config):
        with pytest.raises(UserError, match=r"model\.safetensors: truncated, or not a safetensors file") as caught:
            read(saved)
        assert "\n" not in str(caught.value)


def rewrite(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(tensors, path, {key: value for key, value in (old | metadata).items() if value})


def test_foreign_files_are_named(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("import this\n" * 1000)
    with pytest.raises(UserError, match="text: truncated, or not a safetensors file"):
        load_model(tmp_path / "text")
    torch.save({"a": torch.zeros(3)}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match=r"pickle\.pt: truncated, or not a safetensors file"):
        load_model(tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"other\.safetensors: a safetensors file, but not fastgpt's: .*'pt'"):
        load_model(tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="not fastgpt's"):
        load_model(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "version '2' of the format; this fastgpt reads version '1'"),
        ({"config": "{"}, "the configuration in the file cannot be used"),
        ({"config": "[]"}, "it is no JSON object"),
        ({"config": ""}, "it is no JSON object"),
        ({"config": json.dumps(SHAPE | {"n_heads": 2})}, "unknown model key 'n_heads'; did you mean 'n_head'"),
        ({"config": json.dumps(SHAPE | {"n_layer": 3})}, r"tensor 'h\.2\..*' is missing"),
        ({"config": json.dumps(SHAPE | {"n_layer": 1})}, r"tensor 'h\.1\..*' is not part of the model"),
        (
            {"config": json.dumps(SHAPE | {"vocab_size": 32})},
            r"tensor 'wte.weight' is torch.float32 of shape \(31, 16\)",
        ),
    ],
)
def test_a_configuration_that_is_not_the_weights_is_named(saved: Path, metadata: dict, message: str) -> None:
    rewrite(saved, load_file(saved), **metadata)
    with pytest.raises(UserError, match=message):
        load_model(saved)


def test_whole_numbers_are_no_weights(saved: Path) -> None:
    rewrite(saved, {name: tensor.to(torch.int8) for name, tensor in load_file(saved).items()})
    with pytest.raises(UserError, match=r"torch.int8 .* must be floating-point"):
        load_model(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_model(path)


def test_load_weights_keeps_what_the_model_is(model: GPT, saved: Path) -> None:
    other = GPT(GPTConfig(**SHAPE, dropout=0.5, activation="silu", init="he")).double()
    load_weights(other, saved)
    assert other.training
    assert other.config.dropout == 0.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.double())


def test_load_weights_names_every_difference_and_changes_nothing(saved: Path) -> None:
    other = GPT(GPTConfig(**SHAPE | {"n_kv_head": 2, "block_size": 8}))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        UserError, match="another configuration: block_size = 16 there, 8 here; n_kv_head = 1 there, 2 here; activation"
    ):
        load_weights(other, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    model: GPT, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgpt.model.weights.save_file", disk_full)
    with pytest.raises(UserError, match=r"model\.safetensors: the weights cannot be written: No space left on device"):
        save_model(GPT(GPTConfig(**SHAPE)), saved)
    monkeypatch.setattr("fastgpt.model.weights.os.fsync", disk_full)
    with pytest.raises(UserError, match="No space left"):
        save_model(GPT(GPTConfig(**SHAPE)), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_reader_of_the_old_file_keeps_it_whole(model: GPT, saved: Path) -> None:
    before = saved.read_bytes()
    with open(saved, "rb") as reader:
        half = reader.read(len(before) // 2)
        save_model(GPT(GPTConfig(**SHAPE)), saved)
        assert half + reader.read() == before
    assert saved.read_bytes() != before


def test_no_folder_to_write_to(model: GPT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the weights cannot be written: No such file or directory"):
        save_model(model, tmp_path / "missing" / "model.safetensors")
