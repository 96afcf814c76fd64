"""GGUF, the file format of llama.cpp, read and written through the package `gguf` (pip install gguf).

Read are the architectures gpt2, llama (Mistral too) and qwen2, with tensors in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and
whatever else the package dequantises; weights become `dtype`. Written are gpt2, llama and qwen2 in F32, F16 or BF16.

llama.cpp turns the pairs (2i, 2i + 1) of a head in the architecture llama, and (i, i + D / 2) in qwen2. The rows of queries and keys
are therefore interleaved in files of the former, and put back here.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.errors import UserError
from fastgpt.model import foreign
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.huggingface import _shortened
from fastgpt.model.rope import rope_scale
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.huggingface import all_pairs, byte_alphabet

_ARCHITECTURES = ("gpt2", "llama", "qwen2")
_INTERLEAVED = re.compile(r"attn_[qk]\.(weight|bias)$")

# llama.cpp's names of splitting rules. smollm: every digit alone, the rest by GPT-2's rule; spaces before a digit are at an end.
_PATTERNS = {
    "gpt-2": "gpt2",
    "gpt2": "gpt2",
    "default": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
_SPECIAL = (2, 3, 4)  # token types: unknown, control, user-defined


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf (pip install gguf)") from None
    return gguf


def _reader(path: Path) -> Any:
    gguf = _package()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever the bytes make the package raise
        raise UserError(f"{path}: truncated, or not a GGUF file at all ({error})") from error


def _values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}


def _permuted(x: torch.Tensor, heads: int, *, back: bool) -> torch.Tensor:
    """Rows of each head from (i, i + D / 2) to (2i, 2i + 1), or back."""
    pairs = x.unflatten(0, (heads, -1, 2) if back else (heads, 2, -1))
    return pairs.transpose(1, 2).reshape(x.shape)


def _config(values: dict[str, Any], tensors: dict[str, Any], path: Path) -> GPTConfig:
    arch = values.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise UserError(f"{path}: architecture {arch!r}; accepted: {', '.join(_ARCHITECTURES)}")
    try:
        width, heads = values[f"{arch}.embedding_length"], values[f"{arch}.attention.head_count"]
        shape = {
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "block_size": values[f"{arch}.context_length"],
            "n_layer": values[f"{arch}.block_count"],
            "n_head": heads,
            "n_embd": width,
            "n_hidden": values[f"{arch}.feed_forward_length"],
            "tied_head": "output.weight" not in tensors,
        }
        if arch == "gpt2":
            return GPTConfig(**shape, norm_eps=values["gpt2.attention.layer_norm_epsilon"])
        turned = values.get(f"{arch}.rope.dimension_count", width // heads)
        if turned != width // heads or values.get(f"{arch}.attention.key_length", turned) != width // heads:
            raise UserError(f"{path}: heads that are {turned} wide or turn in part; accepted: {width // heads}")
        if values.get(f"{arch}.expert_count", 0):
            raise UserError(f"{path}: a mixture of experts, which GPT is not")
        theta = values.get(f"{arch}.rope.freq_base", 10000.0)
        config = GPTConfig(
            **shape,
            n_kv_head=values.get(f"{arch}.attention.head_count_kv", heads),
            bias="blk.0.attn_output.bias" in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
            activation="swiglu",
            norm="rms_norm",
            norm_eps=values[f"{arch}.attention.layer_norm_rms_epsilon"],
            position="rope",
            rope_theta=theta,
        )
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing") from None
    return GPTConfig.from_dict(config.to_dict() | {"rope_scaling": _scaling(values, tensors, config, arch, path)})


def _scaling(
    values: dict[str, Any], tensors: dict[str, Any], config: GPTConfig, arch: str, path: Path
) -> dict[str, Any] | None:
    """The scaling of turns. Llama 3's stands in the file as a factor for each frequency, so its four numbers are looked for among
    those that Meta published."""
    kind = values.get(f"{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return {"type": "linear", "factor": values[f"{arch}.rope.scaling.factor"]}
    if kind != "none":
        raise UserError(f"{path}: rope.scaling.type is {kind!r}; accepted: none, linear")
    if "rope_freqs.weight" not in tensors:
        return None
    factors = torch.from_numpy(np.array(tensors["rope_freqs.weight"].data)).double()
    for factor in (8.0, 32.0, 2.0, 4.0, 16.0):
        for length in (8192, 4096, 16384):
            scaling = {"type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            scaling["original_block_size"] = length
            scale = rope_scale(GPTConfig.from_dict(config.to_dict() | {"rope_scaling": scaling}))
            if isinstance(scale, torch.Tensor) and torch.allclose(1 / scale, factors, rtol=1e-4):
                return scaling
    raise UserError(f"{path}: rope_freqs.weight is none of the scalings that Llama 3 models were published with")


def load_gguf(
    path: str | os.PathLike[str], *, block_size: int | None = None, dtype: torch.dtype = torch.float32
) -> GPT:
    """The model of a GGUF file, in evaluation mode.

    Args:
        path: the file.
        block_size: a shorter context than the file's; rotary tables and caches are smaller then.
        dtype: of the weights.

    Raises:
        UserError: no such file, no GGUF, an architecture or option that GPT does not have, a quantisation that the package gguf cannot
            undo; or the package is not installed.
    """
    gguf = _package()
    path = Path(path)
    reader = _reader(path)
    values, tensors = _values(reader), {tensor.name: tensor for tensor in reader.tensors}
    config = _shortened(_config(values, tensors, path), block_size)
    arch = values["general.architecture"]

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        try:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{path}: {name} is quantised as {tensor.tensor_type.name}, which cannot be undone"
            ) from None
        weight = torch.from_numpy(np.array(data, dtype=np.float32))
        if arch == "llama" and _INTERLEAVED.search(name):
            heads = config.n_head if ".attn_q." in name else config.kv_heads
            weight = _permuted(weight, heads, back=True)
        return weight

    return foreign.load(
        config,
        "gguf-gpt2" if arch == "gpt2" else "gguf-llama",
        read,
        tensors,
        where=str(path),
        ignored=r"^rope_freqs\.weight$",
        dtype=dtype,
    )


def save_gguf(
    model: GPT,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a GGUF file that llama.cpp and `load_gguf` read.

    Args:
        model: a GPT in GPT-2's, Llama's or Qwen2's configuration.
        path: the file to write or replace.
        tokenizer: goes into the file where given; its pattern must be one that llama.cpp has a name for.
        dtype: of the matrices: float32, float16 or bfloat16. Vectors are float32.

    Raises:
        UserError: a configuration, dtype or tokenizer that the format has no words for; or the package is not installed.
    """
    gguf = _package()
    path, config = Path(path), model.config
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if dtype not in kinds:
        raise UserError(f"dtype: got {dtype}; accepted: {', '.join(map(str, kinds))}")
    kind = gguf.GGMLQuantizationType[kinds[dtype]]
    arch = _architecture(config)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(partial, arch)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        scale = rope_scale(config)
        if isinstance(scale, torch.Tensor):
            writer.add_tensor("rope_freqs.weight", (1 / scale).float().numpy())
        elif scale != 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(1 / scale)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in foreign.their_tensors(model, "gguf-gpt2" if arch == "gpt2" else "gguf-llama"):
        tensor = tensor.float()
        if arch == "llama" and _INTERLEAVED.search(name):
            tensor = _permuted(tensor, config.n_head if ".attn_q." in name else config.kv_heads, back=False)
        as_kind = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), as_kind), raw_dtype=as_kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _architecture(config: GPTConfig) -> str:
    kind = (config.norm, config.position, config.activation)
    if kind == ("layer_norm", "learned", "gelu_tanh"):
        if config.kv_heads != config.n_head or not all((config.bias, *map(config.has_bias, ("qkv", "mlp", "norm")))):
            raise UserError("GPT-2 in GGUF has biases everywhere and no grouped heads; this model differs")
        return "gpt2"
    if kind == ("rms_norm", "rope", "swiglu"):
        return "qwen2" if config.has_bias("qkv") and not config.bias else "llama"
    raise UserError(
        f"GGUF has no architecture with norm = {config.norm!r}, position = {config.position!r} and activation = "
        f"{config.activation!r}; accepted: layer_norm, learned, gelu_tanh (gpt2) or rms_norm, rope, swiglu (llama)"
    )


def load_gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF file.

    A vocabulary may lack single bytes that its training text did not have (SmolLM2's lacks some control characters). Those get ids
    behind the vocabulary, which a model refuses as out of range; llama.cpp leaves such bytes out.

    Raises:
        UserError: no such file, no GGUF, another kind of tokenizer, or a splitting rule that is not known.
    """
    path = Path(path)
    fields = _reader(path).fields
    values = {name.removeprefix("tokenizer.ggml."): field for name, field in fields.items()}
    kind = values["model"].contents() if "model" in values else None
    if kind != "gpt2":
        raise UserError(f"{path}: a tokenizer of kind {kind!r}; accepted: gpt2, which is byte-level BPE")
    pre = values["pre"].contents() if "pre" in values else "default"
    if pre not in _PATTERNS:
        raise UserError(f"{path}: the splitting rule {pre!r}; accepted: {', '.join(_PATTERNS)}")
    texts: list[str] = values["tokens"].contents()
    types = values["token_type"].contents() if "token_type" in values else [1] * len(texts)
    alphabet = byte_alphabet()
    special = {text: id for id, (text, type) in enumerate(zip(texts, types, strict=True)) if type in _SPECIAL}
    # Unused places of the vocabulary (type 5) stand for nothing.
    ids = {text: id for id, (text, type) in enumerate(zip(texts, types, strict=True)) if type == 1}
    tokens = {bytes(alphabet[character] for character in text): id for text, id in ids.items()}
    missing = [bytes([byte]) for byte in range(256) if bytes([byte]) not in tokens]
    tokens |= {byte: id for id, byte in enumerate(missing, len(texts))}
    merges = [merge.split(" ") for merge in values["merges"].contents()]
    return Tokenizer(
        tokens,
        pattern=_PATTERNS[pre],
        special_tokens=special,
        name=path.stem,
        merges=[(ids[left], ids[right]) for left, right in merges],
        whole_first=pre in ("llama-bpe", "llama3"),
    )


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    names = {rule: name for name, rule in reversed(_PATTERNS.items())}
    rule = tokenizer.pattern_name or tokenizer.pattern
    if rule not in names:
        raise UserError(f"tokenizer: its pattern is {rule!r}; GGUF has names for {', '.join(names)}")
    if tokenizer.n_vocab > vocab_size:
        raise UserError(f"tokenizer: has {tokenizer.n_vocab} tokens, and the model {vocab_size}")
    characters = {byte: character for character, byte in byte_alphabet().items()}

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    by_id = {id: written(token) for token, id in tokenizer.tokens.items()}
    # As in tokenizer.json: where ids are ranks, every pair that joins to a token, in order of that token.
    given = [(by_id[left], by_id[right]) for left, right in tokenizer.merges]
    merges = given or [(written(a), written(b)) for a, b in all_pairs(tokenizer.tokens)]
    special = {id: text for text, id in reversed(tokenizer.special_tokens.items())}  # of two names the first
    texts = [special.get(id, by_id.get(id, f"[unused {id}]")) for id in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(names[rule])
    writer.add_token_list(texts)
    writer.add_token_types([3 if id in special else 1 if id in by_id else 5 for id in range(vocab_size)])
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    if tokenizer.eot_token is not None:
        end = tokenizer.special_tokens[END_OF_TEXT]
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
