"""Where a fine-tuning stands, in one file from which it goes on exactly: what is trained, its moments, random-number states, the step.

    RUN/checkpoint.safetensors    written beside its place and renamed (fastgpt.train.files), so a kill leaves the old or the new one

Weights that are not trained are not in it: they are the base model's. Each tensor's CRC-32 stands in the metadata, so a damaged file is
noticed and never half loaded. The file goes when the run is finished.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt.errors import UserError
from fastgpt.train.files import replace_file
from fastgpt.train.optimizer import AdamW

FORMAT = "fastgpt-finetune-checkpoint"
RNG = ("rng.cpu", "rng.cuda")


def _trained(model: torch.nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """The trained parameters and their moments, by names for the file."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"weight.{name}"] = parameter.data
            for key, value in optimizer.moments(parameter).items():
                found[f"{key}.{name}"] = value
    return found


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def save_state(path: Path, model: torch.nn.Module, optimizer: AdamW, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: the file, replaced atomically.
        model: whose trainable parameters are kept.
        optimizer: over them.
        state: everything else, what JSON holds.

    Raises:
        OSError, SafetensorError: it cannot be written; the old file is untouched.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _trained(model, optimizer).items()}
    tensors[RNG[0]] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors[RNG[1]] = torch.cuda.get_rng_state()
    metadata = {
        "format": FORMAT,
        "state": json.dumps(state),
        "updates": str(optimizer.steps),
        "crc32": json.dumps({name: _crc32(tensor) for name, tensor in tensors.items()}),
    }
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path, model: torch.nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Put a checkpoint's weights, moments and random-number states in place; returns the rest.

    Raises:
        UserError: the file is damaged, of another kind, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: its format is {metadata.get('format')!r}; accepted is {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state, sums = json.loads(metadata["state"]), json.loads(metadata["crc32"])
        optimizer.steps = int(metadata["updates"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}; remove it to begin the run again") from error
    for name, tensor in tensors.items():
        if _crc32(tensor) != sums.get(name):
            raise UserError(
                f"the checkpoint {path} is damaged: the content of {name} has changed; remove it to begin the run again"
            )
    places = _trained(model, optimizer)
    for name in sorted(set(places) | set(tensors) - set(RNG)):
        if name not in places or name not in tensors or places[name].shape != tensors[name].shape:
            raise UserError(f"the checkpoint {path} is of another model: {name} does not fit")
    for name, place in places.items():
        place.copy_(tensors[name])
    torch.set_rng_state(tensors[RNG[0]])
    if RNG[1] in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[RNG[1]])
    return state
