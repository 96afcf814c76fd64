"""Other libraries' names of a GPT's weights, and the way from one to the other.

    gpt2    GPT-2 in Hugging Face and nanoGPT: one projection for queries, keys and values, linear weights as each of them has it
    llama   Llama, Mistral and Qwen2 in Hugging Face: three projections, gate and up apart
    gguf    llama.cpp's names, for both

Where they have several tensors for one of ours, ours is theirs one below the other.
"""

import re
from collections.abc import Callable, Collection, Iterator

import torch

from fastgpt.errors import UserError
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT

_GPT2 = {
    "wte": ["transformer.wte"],
    "wpe": ["transformer.wpe"],
    "ln_f": ["transformer.ln_f"],
    "lm_head": ["lm_head"],
    **{
        part: ["transformer.h.{}." + part]
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    },
}
_LLAMA = {
    "wte": ["model.embed_tokens"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
    "ln_1": ["model.layers.{}.input_layernorm"],
    "attn.c_attn": [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
    "attn.c_proj": ["model.layers.{}.self_attn.o_proj"],
    "ln_2": ["model.layers.{}.post_attention_layernorm"],
    "mlp.c_fc": ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
    "mlp.c_proj": ["model.layers.{}.mlp.down_proj"],
}
_GGUF = {
    "wte": ["token_embd"],
    "wpe": ["position_embd"],
    "ln_f": ["output_norm"],
    "lm_head": ["output"],
    "ln_1": ["blk.{}.attn_norm"],
    "attn.c_proj": ["blk.{}.attn_output"],
    "ln_2": ["blk.{}.ffn_norm"],
    "mlp.c_proj": ["blk.{}.ffn_down"],
}
_FAMILIES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "gguf-gpt2": _GGUF | {"attn.c_attn": ["blk.{}.attn_qkv"], "mlp.c_fc": ["blk.{}.ffn_up"]},
    "gguf-llama": _GGUF
    | {
        "attn.c_attn": [f"blk.{{}}.attn_{part}" for part in "qkv"],
        "mlp.c_fc": ["blk.{}.ffn_gate", "blk.{}.ffn_up"],
    },
}
_OURS = re.compile(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)")


def their_names(name: str, family: str) -> list[str]:
    """A family's names of one of GPT's weights, in the order of their rows.

    Example:
        >>> their_names("h.3.mlp.c_fc.weight", "llama")
        ['model.layers.3.mlp.gate_proj.weight', 'model.layers.3.mlp.up_proj.weight']
    """
    match = _OURS.fullmatch(name)
    assert match is not None  # the names of GPT's state_dict
    layer, part, kind = match.groups()
    return [f"{template.format(layer)}.{kind}" for template in _FAMILIES[family][part]]


def _rows(name: str, config: GPTConfig, parts: int) -> list[int]:
    """Rows of each of their tensors that make one of ours."""
    if ".c_attn." in name:
        return [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    return [config.hidden] * parts


def load(
    config: GPTConfig,
    family: str,
    read: Callable[[str], torch.Tensor],
    present: Collection[str],
    *,
    where: str,
    ignored: str,
    dtype: torch.dtype,
) -> GPT:
    """A GPT in evaluation mode from another library's tensors.

    Args:
        config: the model's configuration.
        family: whose names they have.
        read: gives the tensor of one of their names, linear weights as (out, in).
        present: the names that are there.
        where: the file, for messages.
        ignored: a pattern of names that are no weights, or repeat others.
        dtype: of the weights.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape.
    """
    with torch.device("meta"):
        model = GPT(config)
    weights, left = {}, set(present)
    for name, expected in model.state_dict().items():
        names = their_names(name, family)
        for theirs in names:
            if theirs not in present:
                raise UserError(f"{where}: tensor {theirs!r} is missing")
        tensor = torch.cat([read(theirs).to(dtype) for theirs in names])
        if name == "wpe.weight":
            tensor = tensor[: config.block_size]
        if tensor.shape != expected.shape:
            got, need = tuple(tensor.shape), tuple(expected.shape)
            raise UserError(f"{where}: {' and '.join(names)}: shape {got}; its own configuration says {need} ({name})")
        weights[name] = tensor.contiguous()
        left -= set(names)
    if unknown := sorted(name for name in left if not re.search(ignored, name)):
        raise UserError(f"{where}: {len(unknown)} tensors are not part of the model, the first one {unknown[0]!r}")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def their_tensors(model: GPT, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A GPT's weights under a family's names, on the CPU; linear weights are (out, in)."""
    for name, tensor in model.state_dict().items():
        names, tensor = their_names(name, family), tensor.detach().cpu()
        parts = tensor.split(_rows(name, model.config, len(names))) if len(names) > 1 else (tensor,)
        yield from ((theirs, part.contiguous()) for theirs, part in zip(names, parts, strict=True))
