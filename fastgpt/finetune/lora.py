"""LoRA: low-rank updates of a model's linear layers, saved in peft's format.

    y = x W^T + b + (alpha / r) dropout(x) A^T B^T        W (out, in) frozen, A (r, in), B (out, r)

Hu et al., arXiv:2106.09685, section 4.1. A starts uniform as torch's linear layers do, B at zero, so that training starts from the
pretrained function. New rows of the embedding (special tokens) cannot be low-rank updates of anything: the embedding, and an untied
head, are then trained and saved whole, which peft calls modules_to_save.

A saved adapter is a folder with adapter_config.json and adapter_model.safetensors under peft's keys, `base_model.model.` and the
module's name; `peft.PeftModel.from_pretrained(gpt, folder)` loads it onto the same base model.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastgpt import ops
from fastgpt.errors import UserError
from fastgpt.train.files import explain_writing, replace_file, replace_text

TARGETS = ("c_attn", "c_proj", "c_fc")  # every linear layer of a block
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoRALinear(torch.nn.Module):
    """A linear layer with a low-rank update beside it.

    Args:
        base_layer: the layer; its parameters are frozen.
        rank: r, at least 1.
        alpha: the update counts alpha / rank times.
        dropout: probability on the update's input, in training mode.

    Shapes: (..., in) to (..., out), as the layer's own.

    Raises:
        ValueError: a rank below 1.

    Example:
        >>> LoRALinear(torch.nn.Linear(8, 4), rank=2, alpha=4.0)(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, base_layer: torch.nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: got {rank}; accepted: at least 1")
        kind: dict[str, Any] = {"bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = torch.nn.Linear(base_layer.in_features, rank, **kind)
        self.lora_B = torch.nn.Linear(rank, base_layer.out_features, **kind)
        torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.lora_B(self.lora_A(ops.dropout(x, self.dropout, self.training)))  # (..., out)
        return self.base_layer(x) + self.scale * update

    @torch.no_grad()
    def merged(self) -> torch.nn.Linear:
        """The layer with the update added to its weight, in place: W + (alpha / r) B A."""
        self.base_layer.weight += self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return self.base_layer.requires_grad_(True)


def add_lora(
    model: torch.nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    *,
    targets: Sequence[str] = TARGETS,
    train_whole: Sequence[str] = (),
) -> list[str]:
    """Freeze a model and give its linear layers low-rank updates, in place.

    Args:
        model: any module.
        rank, alpha, dropout: as LoRALinear.
        targets: last parts of the names of the layers to update.
        train_whole: names of modules whose parameters stay trainable.

    Returns:
        The names of the layers that have an update now.

    Raises:
        ValueError: no linear layer has such a name.

    Example:
        >>> add_lora(gpt, rank=8, alpha=16.0)[0]  # doctest: +SKIP
        'h.0.attn.c_attn'
    """
    model.requires_grad_(False)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in targets
    ]
    if not found:
        raise ValueError(f"targets: no linear layer is called {', '.join(targets)}")
    for name in found:
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout))
    for name in train_whole:
        model.get_submodule(name).requires_grad_(True)
    return found


def merge_lora(model: torch.nn.Module) -> None:
    """Add every low-rank update to its layer's weight and put the layer back, in place; all parameters are trainable again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    model.requires_grad_(True)


def adapter_tensors(model: torch.nn.Module, train_whole: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Copies of what was trained, under peft's keys."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = module.lora_A.weight
            tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_B.weight
    for name in train_whole:
        for part, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name}.{part}"] = parameter
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def save_adapter(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = TARGETS,
    train_whole: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Write what `adapter_tensors` gave as a folder that peft loads; `base` says which model it belongs to.

    Raises:
        UserError: it cannot be written.
    """
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(targets),
        "modules_to_save": list(train_whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
    with explain_writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
        replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Fill the updates that a model has (`add_lora`) from a saved adapter, in place.

    Raises:
        UserError: no adapter there, or one that does not fit.
    """
    config, tensors = _read(folder)
    wanted = adapter_tensors(model, config.get("modules_to_save") or [])
    for name in sorted(set(wanted) | set(tensors)):
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape:
            raise UserError(f"{folder}: does not fit the model: tensor {name!r}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name.removeprefix(PREFIX)).copy_(tensor)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: no LoRA adapter can be read: {error}") from error


def load_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Give a base model the updates of a saved adapter, in place; `merge_lora` then makes it an ordinary model again.

    Args:
        model: the model that the adapter was trained on.
        folder: what `save_adapter`, or peft for the same layers, wrote.

    Raises:
        UserError: no adapter there, one of another kind, or one that does not fit the model.
    """
    config, _ = _read(folder)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("use_rslora"):
        raise UserError(f"{folder}: accepted is a plain LoRA adapter without biases")
    whole = config.get("modules_to_save") or []
    try:
        targets = config["target_modules"]
        add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], targets=targets, train_whole=whole)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: does not fit the model: {error}") from error
    read_adapter(model, folder)
