"""Models from and to Hugging Face's folders, nanoGPT's checkpoints and GGUF: the same logits on both sides."""

import json
from pathlib import Path

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig, load_gguf, load_gguf_tokenizer, save_gguf, save_model
from fastgpt.model.huggingface import config_from_huggingface
from fastgpt.tokenizer import Tokenizer

SHAPE = {"vocab_size": 300, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"norm": "rms_norm", "position": "rope", "activation": "swiglu", "bias": False, "n_kv_head": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 8192}
OURS = {
    "gpt2": {},
    "gpt2 without biases": {"bias": False, "activation": "gelu", "tied_head": False, "n_hidden": 48},
    "llama": LLAMA,
    "llama with everything": LLAMA
    | {"bias": True, "tied_head": False, "rope_theta": 5e5, "activation": "geglu_tanh", "norm_eps": 1e-6},
    "llama3": LLAMA | {"rope_scaling": {"type": "llama3"} | LLAMA3, "rope_theta": 5e5},
    "linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": LLAMA | {"qkv_bias": True},
}


def built(name: str) -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | OURS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randint(300, (2, 32))


def logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(idx, all_logits=True)[0]


def same_function(a: GPT, b: GPT) -> bool:
    """Whether two models have the same weights, biases of 0 aside, and the same logits."""
    idx = torch.randint(300, (2, 32))
    return torch.allclose(logits(a, idx), logits(b, idx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, idx = built(name)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.inference_mode():
        want = theirs(idx).logits
    torch.testing.assert_close(logits(model, idx), want, rtol=2e-4, atol=2e-5)
    assert same_function(model, GPT.from_pretrained(tmp_path))


THEIRS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "activation_function": "gelu_new"},
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def theirs(family: str, **changes):
    transformers = pytest.importorskip("transformers")
    values = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None} | THEIRS[family] | changes
    if family != "gpt2":
        values |= {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
        }
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", ["one file", "shards", "bin", "headless"])
@pytest.mark.parametrize("family", THEIRS)
def test_what_transformers_saves_is_loaded(family: str, form: str, tmp_path: Path) -> None:
    model = theirs(family)
    if form == "headless" and family in ("llama", "mistral"):
        pytest.skip("the head is not tied, so a model without it is not whole")
    if form == "headless":
        model.base_model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "shards" else "1GB")
    if form == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.block_size == (16 if family == "mistral" else 32)
    idx = torch.randint(300, (2, ours.config.block_size))
    with torch.inference_mode():
        want = model(idx).logits
    torch.testing.assert_close(logits(ours, idx), want, rtol=2e-4, atol=2e-5)
    short = GPT.from_pretrained(tmp_path, block_size=8, dtype=torch.bfloat16)
    assert short.config.block_size == 8
    assert short.wte.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(short, idx[:, :8]).float(), want[:, :8], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoint(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "vocab_size": 300, "bias": False}
    model = GPT(GPTConfig(**arguments, activation="gelu")).eval()
    weights = {f"{prefix}transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    weights[f"{prefix}lm_head.weight"] = model.wte.weight.detach()
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # its mask, which is no weight
    checkpoint = {"model": weights, "model_args": arguments | {"dropout": 0.1}, "iter_num": 5, "config": {"lr": 1.0}}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert same_function(model, GPT.from_pretrained(tmp_path / "ckpt.pt"))
    assert GPT.from_pretrained(tmp_path / "ckpt.pt").config == model.config


def test_our_own_files_load_too(tmp_path: Path) -> None:
    model, _ = built("llama3")
    save_model(model, tmp_path / "model.safetensors")
    assert GPT.from_pretrained(tmp_path).config == model.config
    assert same_function(model, GPT.from_pretrained(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "linear", "qwen2"])
def test_gguf_both_ways(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model, idx = built(name)
    save_gguf(model, tmp_path / "model.gguf")
    loaded = GPT.from_pretrained(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(loaded, idx), logits(model, idx), rtol=1e-5, atol=1e-6)
    save_gguf(model, tmp_path / "half.gguf", dtype=torch.bfloat16)
    rounded = load_gguf(tmp_path / "half.gguf").h[0].mlp.c_fc.weight
    assert torch.equal(rounded, model.h[0].mlp.c_fc.weight.bfloat16().float())


def test_transformers_reads_our_gguf(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    model, idx = built("llama")
    tokenizer = trained_tokenizer()
    save_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits(model, idx), theirs(idx).logits, rtol=2e-4, atol=2e-5)


def trained_tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox 123 jumps over the lazy dog, the end\n"] * 3, vocab_size=290)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F16"])
def test_gguf_quantisations_are_undone(kind: str, tmp_path: Path) -> None:
    """A matrix quantised by the package is, in the model, within half a step of what it was."""
    gguf = pytest.importorskip("gguf")
    model, _ = built("llama")
    plain = tmp_path / "plain.gguf"
    save_gguf(model, plain)
    reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    steps = {"Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 7, "BF16": 2**-8, "F16": 2**-11}
    for tensor in reader.tensors:
        to = gguf.GGMLQuantizationType[kind if "ffn" in tensor.name and tensor.data.ndim == 2 else "F32"]
        if to.name.startswith("Q") and tensor.data.shape[-1] % 32:
            to = gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, to), raw_dtype=to)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    got, want = load_gguf(tmp_path / "q.gguf").h[0].mlp.c_fc.weight, model.h[0].mlp.c_fc.weight
    assert not torch.equal(got, want)
    assert (got - want).abs().max() <= steps[kind] * want.abs().max()


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    text = "the quick fox  jumps 12345 times, don't   it?\n\n end"
    model, _ = built("gpt2")
    tokenizer = trained_tokenizer()
    model.save_pretrained(tmp_path, tokenizer)
    assert Tokenizer.from_huggingface(tmp_path).encode(text) == tokenizer.encode(text)
    if transformers := pytest.importorskip("transformers"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert theirs.encode(text) == tokenizer.encode(text)


def test_the_tokenizer_in_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    text = "the quick fox  jumps 12345 times, don't   it?\n\n end"
    model, _ = built("gpt2")
    tokenizer = trained_tokenizer()
    save_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    loaded = load_gguf_tokenizer(tmp_path / "model.gguf")
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.special_tokens == tokenizer.special_tokens


GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA_JSON = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; accepted: gpt2, llama, mistral, qwen2"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2 | {"activation_function": "xielu"}, "activation 'xielu'; accepted: gelu_new"),
        ({k: v for k, v in GPT2.items() if k != "n_embd"}, "key 'n_embd' is missing"),
        (LLAMA_JSON | {"head_dim": 16}, "head_dim is 16; accepted: 8"),
        (LLAMA_JSON | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        (LLAMA_JSON | {"hidden_act": "relu"}, "hidden_act is 'relu'; accepted: silu, gelu, gelu_tanh"),
    ],
)
def test_what_gpt_does_not_have_is_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from_huggingface(values)


def test_the_keys_of_transformers_4_and_5_say_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    four = config_from_huggingface(LLAMA_JSON | {"rope_theta": 1e6, "rope_scaling": scaling})
    five = config_from_huggingface(LLAMA_JSON | {"rope_parameters": scaling | {"rope_theta": 1e6}})
    assert four == five
    assert (four.rope_theta, four.rope_scaling) == (1e6, {"type": "linear", "factor": 2.0})


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    model, _ = built("gpt2")
    with pytest.raises(UserError, match="no such file or folder"):
        GPT.from_pretrained(tmp_path / "nowhere.gguf")
    with pytest.raises(UserError, match=r"neither config.json nor model.safetensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_layer": 3, "n_positions": 32}))
    with pytest.raises(UserError, match=r"tensor 'transformer.h.2.ln_1.weight' is missing"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"n_layer": 1, "n_positions": 32}))
    with pytest.raises(UserError, match="12 tensors are not part of the model"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"vocab_size": 400, "n_positions": 32}))
    with pytest.raises(UserError, match=r"shape \(300, 32\); its own configuration says \(400, 32\)"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"broken.pt: cannot be read"):
        GPT.from_pretrained(tmp_path / "broken.pt")
    with pytest.raises(UserError, match="no family of transformers has norm = 'rms_norm'"):
        GPT(GPTConfig(**SHAPE, norm="rms_norm", bias=False)).save_pretrained(tmp_path)


def test_gguf_that_is_none_is_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(UserError, match="truncated, or not a GGUF file"):
        load_gguf(tmp_path / "x.gguf")
    model, _ = built("gpt2")
    with pytest.raises(UserError, match=r"dtype: got torch.float64"):
        save_gguf(model, tmp_path / "y.gguf", dtype=torch.float64)
    with pytest.raises(UserError, match="GGUF has no architecture with"):
        save_gguf(built("llama with everything")[0], tmp_path / "y.gguf")
