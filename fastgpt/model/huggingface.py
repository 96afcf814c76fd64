"""Models in Hugging Face's folders (config.json, *.safetensors or *.bin) and nanoGPT's checkpoints, read; folders for transformers,
written.

Read are the families gpt2, llama, mistral and qwen2. What changes the numbers and is not in GPT raises UserError; a sliding window is
read by keeping block_size below it, where it has no effect. Dropout is not taken over. Written are gpt2 and llama, and qwen2 where
only queries, keys and values have biases.

The only thing that may reach the network is a name that is no path ("gpt2", "HuggingFaceTB/SmolLM2-135M").
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt.errors import UserError
from fastgpt.model import foreign
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.files import write_atomically

# Names of activations in config.json; the first of each is the one written.
_ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu": ("gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "sigmoid": ("sigmoid",),
    "tanh": ("tanh",),
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
_IGNORED = r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$|^lm_head\.weight$"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONV1D = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")


def _activation(name: Any, where: str) -> str:
    for ours, theirs in _ACTIVATIONS.items():
        if name in theirs:
            return ours
    known = ", ".join(theirs for names in _ACTIVATIONS.values() for theirs in names)
    raise UserError(f"{where}: activation {name!r}; accepted: {known}")


def _refuse(values: Mapping[str, Any], where: str, **needed: Any) -> None:
    """Raises where a key is there with another value than the one that GPT computes with."""
    for name, value in needed.items():
        if values.get(name) not in (None, value):
            raise UserError(f"{where}: {name} is {values[name]!r}; accepted: {value!r}")


def _scaling(values: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, from the keys of transformers 4 or those of 5."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse(rope, where, partial_rotary_factor=1.0)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, {"type": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return theta, {"type": kind, "original_block_size": rope["original_max_position_embeddings"]} | {
            key: rope[key] for key in keys
        }
    raise UserError(f"{where}: rope_type is {kind!r}; accepted: default, linear, llama3")


def config_from_huggingface(values: Mapping[str, Any], where: str = "config.json") -> GPTConfig:
    """The GPTConfig of a config.json's content.

    Raises:
        UserError: another family, a missing key, or an option that GPT does not have.

    Example:
        >>> config_from_huggingface({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}).block_size
        1024
    """
    family = values.get("model_type")
    try:
        if family == "gpt2":
            return _from_gpt2(values, where)
        if family in ("llama", "mistral", "qwen2"):
            return _from_llama(values, where)
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing") from None
    raise UserError(f"{where}: model_type is {family!r}; accepted: gpt2, llama, mistral, qwen2")


def _from_gpt2(values: Mapping[str, Any], where: str) -> GPTConfig:
    _refuse(values, where, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=values.get("n_positions", 1024),
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_hidden=values.get("n_inner"),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=_activation(values.get("activation_function", "gelu_new"), where),
        tied_head=values.get("tie_word_embeddings", True),
    )


def _from_llama(values: Mapping[str, Any], where: str) -> GPTConfig:
    qwen = values["model_type"] == "qwen2"
    width, heads = values["hidden_size"], values["num_attention_heads"]
    _refuse(values, where, head_dim=width // heads)
    gate = _activation(values.get("hidden_act", "silu"), where)
    if gate not in _GATED:
        raise UserError(f"{where}: hidden_act is {values['hidden_act']!r}; accepted: {', '.join(_GATED)}")
    longest = values["max_position_embeddings"]
    window = values.get("sliding_window") if values.get("use_sliding_window", not qwen) else None
    theta, scaling = _scaling(values, where)
    return GPTConfig(
        vocab_size=values["vocab_size"],
        block_size=min(longest, window or longest),
        n_layer=values["num_hidden_layers"],
        n_head=heads,
        n_kv_head=values.get("num_key_value_heads"),
        n_embd=width,
        n_hidden=values["intermediate_size"],
        bias=bool(values.get("attention_bias", False)),
        qkv_bias=True if qwen else None,
        mlp_bias=bool(values.get("mlp_bias", False)),
        activation=_GATED[gate],
        norm="rms_norm",
        norm_eps=values.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=bool(values.get("tie_word_embeddings", False)),
    )


def config_to_huggingface(config: GPTConfig) -> dict[str, Any]:
    """config.json's content for transformers.

    Raises:
        UserError: no family of transformers computes this configuration.

    Example:
        >>> config_to_huggingface(model.config)["model_type"]
        'gpt2'
    """
    kind = (config.norm, config.position, config.activation in _GATED.values())
    if kind == ("layer_norm", "learned", False):
        if config.kv_heads != config.n_head:
            raise UserError(f"n_kv_head: got {config.n_kv_head}; GPT-2 in transformers has no grouped heads")
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.block_size,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.hidden,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": _ACTIVATIONS[config.activation][0],
            "tie_word_embeddings": config.tied_head,
            **dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout),
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    if kind == ("rms_norm", "rope", True):
        qwen = config.has_bias("qkv") and not config.bias and not config.has_bias("mlp")
        if config.has_bias("qkv") != config.bias and not qwen:
            raise UserError(
                f"qkv_bias: got {config.qkv_bias} with bias = {config.bias}; transformers has no such Llama"
            )
        gate = next(name for name, gated in _GATED.items() if gated == config.activation)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_scaling is not None:
            scaling = dict(config.rope_scaling)
            rope["rope_type"] = scaling.pop("type")
            if "original_block_size" in scaling:
                scaling["original_max_position_embeddings"] = scaling.pop("original_block_size")
            rope |= scaling
        return {
            "model_type": "qwen2" if qwen else "llama",
            "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.block_size,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "num_key_value_heads": config.kv_heads,
            "hidden_size": config.n_embd,
            "intermediate_size": config.hidden,
            "hidden_act": _ACTIVATIONS[gate][-1 if gate == "gelu_tanh" else 0].replace("fast", "pytorch_tanh"),
            "attention_bias": config.bias,
            "mlp_bias": config.has_bias("mlp"),
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": rope,
            "rope_theta": config.rope_theta,  # transformers 4 reads these two
            "rope_scaling": None if config.rope_scaling is None else rope,
            "tie_word_embeddings": config.tied_head,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    raise UserError(
        f"no family of transformers has norm = {config.norm!r} with position = {config.position!r} and activation = "
        f"{config.activation!r}; accepted: GPT-2's (layer_norm, learned, not gated), Llama's (rms_norm, rope, gated)"
    )


def _open(path: Path) -> tuple[dict[str, Callable[[], torch.Tensor]], Callable[[], None]]:
    """Readers of a folder's tensors by name, and what closes the files."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.exists():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        elif single.exists():
            files = [single.name]
        else:
            continue
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            if suffix == "bin":
                tensors = torch.load(path / file, map_location="cpu", weights_only=True)
                readers |= {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
                continue
            opened = safe_open(path / file, framework="pt")
            readers |= {name: (lambda f=opened, n=name: f.get_tensor(n)) for name in opened.keys()}  # noqa: SIM118
        return readers, readers.clear
    raise UserError(f"{path}: neither model.safetensors nor pytorch_model.bin is there")


def read_huggingface(path: Path, block_size: int | None, dtype: torch.dtype) -> GPT:
    """The model of a folder with config.json; `GPT.from_pretrained` says more."""
    try:
        values = json.loads((path / "config.json").read_bytes())
        config = _shortened(config_from_huggingface(values, f"{path / 'config.json'}"), block_size)
        readers, close = _open(path)
    except (ValueError, OSError, SafetensorError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: cannot be read: {error}") from error
    family = "gpt2" if values["model_type"] == "gpt2" else "llama"
    prefix = "transformer." if family == "gpt2" else "model."
    if not any(name.startswith(prefix) for name in readers):  # saved from the model without its head
        readers = {name if name.startswith("lm_head.") else prefix + name: read for name, read in readers.items()}

    def read(name: str) -> torch.Tensor:
        tensor = readers[name]()
        return tensor.t() if family == "gpt2" and _CONV1D.search(name) else tensor

    try:
        return foreign.load(config, family, read, readers, where=str(path), ignored=_IGNORED, dtype=dtype)
    finally:
        close()


def read_nanogpt(path: Path, block_size: int | None, dtype: torch.dtype) -> GPT:
    """The model of a checkpoint of nanoGPT's train.py: {"model": ..., "model_args": ...}; its names may begin with torch.compile's
    `_orig_mod.`"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        arguments, weights = checkpoint["model_args"], checkpoint["model"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no nanoGPT checkpoint: a dict with 'model' and 'model_args' is needed ({error})"
        ) from None
    except Exception as error:  # torch.load raises whatever the bytes make it raise
        raise UserError(f"{path}: cannot be read: {error}") from error
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    if missing := [key for key in keys if key not in arguments]:
        raise UserError(f"{path}: model_args has no {missing[0]!r}")
    config = _shortened(GPTConfig(**{key: arguments[key] for key in keys}, activation="gelu"), block_size)
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    return foreign.load(config, "gpt2", weights.__getitem__, weights, where=str(path), ignored=_IGNORED, dtype=dtype)


def _shortened(config: GPTConfig, block_size: int | None) -> GPTConfig:
    """The configuration with a shorter context, where one is asked for."""
    if block_size is None:
        return config
    values = config.to_dict()
    if block_size > config.block_size:
        raise UserError(f"block_size: got {block_size}; accepted: at most the model's own, {config.block_size}")
    return GPTConfig.from_dict(values | {"block_size": block_size})


def save_huggingface(model: GPT, folder: str | os.PathLike[str], tokenizer: Tokenizer | None) -> None:
    """Writes config.json and model.safetensors; `GPT.save_pretrained` says more."""
    folder = Path(folder)
    values = config_to_huggingface(model.config)
    values["dtype"] = values["torch_dtype"] = str(model.wte.weight.dtype).removeprefix("torch.")
    family = "gpt2" if values["model_type"] == "gpt2" else "llama"
    tensors = dict(foreign.their_tensors(model, family))
    if family == "gpt2":
        # Conv1D, and biases everywhere: where ours has none, theirs is 0.
        for name in list(tensors):
            if name.endswith("weight") and (".h." in name or ".ln_f." in name):
                bias = name.removesuffix("weight") + "bias"
                tensors.setdefault(bias, tensors[name].new_zeros(tensors[name].shape[0]))
            if _CONV1D.search(name):
                tensors[name] = tensors[name].t().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".model.{os.getpid()}.tmp"
        save_file(tensors, partial, {"format": "pt"})
        os.replace(partial, folder / "model.safetensors")
        write_atomically(folder / "config.json", (json.dumps(values, indent=2) + "\n").encode())
        if tokenizer is not None:
            tokenizer.save_huggingface(folder / "tokenizer.json")
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size}
            if tokenizer.eot_token is not None:
                settings |= dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
            write_atomically(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be written: {error}") from error


def from_pretrained(path_or_name: str | os.PathLike[str], block_size: int | None, dtype: torch.dtype) -> GPT:
    """What `GPT.from_pretrained` does."""
    from fastgpt.model.weights import load_model

    path = Path(path_or_name)
    if not path.exists():
        name = os.fspath(path_or_name)
        if not _HUB_NAME.fullmatch(name) or path.suffix in (".gguf", ".pt", ".safetensors"):
            raise UserError(f"{name}: no such file or folder")
        path = downloaded(name)
    if path.is_dir():
        if (path / "config.json").exists():
            return read_huggingface(path, block_size, dtype)
        if (path / "model.safetensors").exists():
            return load_model(path).to(dtype)
        raise UserError(f"{path}: a folder with neither config.json nor model.safetensors")
    if path.suffix == ".gguf":
        from fastgpt.model.gguf import load_gguf

        return load_gguf(path, block_size=block_size, dtype=dtype)
    if path.suffix == ".safetensors":
        return load_model(path).to(dtype)
    return read_nanogpt(path, block_size, dtype)


def downloaded(name: str) -> Path:
    """The folder of a model of the Hugging Face hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder; a hub name needs the package huggingface_hub (pip install huggingface_hub)"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:
        raise UserError(f"{name}: no such file or folder, and not to be had from the hub: {error}") from error
