"""model.safetensors: a GPT's weights with its configuration in the same file.

The file is safetensors (github.com/huggingface/safetensors) with three metadata keys: "format": "fastgpt-gpt",
"version": "1" and "config", the GPTConfig as JSON. Tensors carry the names of the model's state_dict and the dtype they
have in memory; the tied head is the token embedding and stands in the file once.

A file is written beside its final name, flushed to the disk and renamed, so that a reader sees the old file or the new
one and a kill leaves the old one whole. Optimizer state and the training position are not here: they belong to a
checkpoint.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt.errors import UserError
from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT

FORMAT = "fastgpt-gpt"
VERSION = "1"

# Fields that change no tensor's shape or meaning once the weights exist.
_FREE_FIELDS = ("dropout", "init")


def save_model(model: GPT, path: str | os.PathLike[str]) -> None:
    """Writes a model's weights and configuration, atomically.

    Args:
        model: a GPT on any device; its tensors keep their dtypes.
        path: the file to write or replace; its folder must exist.

    Raises:
        UserError: the file cannot be written (no such folder, no permission, disk full). What stood there before is
            untouched.

    Example:
        >>> save_model(model, "model.safetensors")
        >>> load_model("model.safetensors").config == model.config
        True
    """
    save_tensors({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, model.config, path)


def save_tensors(tensors: Mapping[str, torch.Tensor], config: GPTConfig, path: str | os.PathLike[str]) -> None:
    """`save_model` for weights that no one model holds: those of a model divided over processes, put together.

    Args:
        tensors: by the names of the model's state_dict, on the CPU.
        config: the model's.
        path: as `save_model`.

    Raises:
        UserError: as `save_model`.
    """
    path = Path(path)
    metadata = {"format": FORMAT, "version": VERSION, "config": json.dumps(config.to_dict())}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata)
        umask = os.umask(
            0
        )  # mkstemp makes a file that only its owner reads, and some versions of safetensors keep that
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the weights cannot be written: {_reason(error)}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> GPT:
    """The model that `save_model` wrote, in evaluation mode.

    Args:
        path: a model.safetensors, or a run folder that holds one.
        device: where the weights go.

    Raises:
        UserError: the file is not there, is truncated, was not written by fastgpt, or does not hold what its own
            configuration says.

    Example:
        >>> save_model(model, "model.safetensors")
        >>> load_model("model.safetensors").n_params() == model.n_params()
        True
    """
    path = _weights_file(path)
    config = read_config(path)
    with torch.device("meta"):
        model = GPT(config)
    tensors = _read_tensors(path, model, device)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_weights(
    model: GPT,
    path: str | os.PathLike[str],
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Copies the weights of a file into a model of the same shape, which keeps its device, dtypes, dropout and mode.

    Args:
        model: the model to fill; unchanged if anything is wrong with the file.
        path: a model.safetensors, or a run folder that holds one.
        place: of a model divided over processes: makes of a whole tensor, and the model's own, one that is divided alike.

    Raises:
        UserError: as `load_model`, and where the file was written by a model with another configuration (fields that
            leave the weights' meaning alone, dropout and init, may differ).

    Example:
        >>> save_model(model, "model.safetensors")
        >>> load_weights(GPT(model.config), "model.safetensors")
    """
    path = _weights_file(path)
    check_config(read_config(path), model.config, path)
    tensors = _read_tensors(path, model, "cpu")
    if place is not None:
        tensors = {name: place(tensors[name], there) for name, there in model.state_dict().items()}
    model.load_state_dict(tensors)


def check_config(theirs: GPTConfig, ours: GPTConfig, path: str | os.PathLike[str]) -> None:
    """Raises UserError unless weights of a model with the configuration `theirs`, which stand in `path`, fit one with `ours`."""
    there, here = theirs.to_dict(), ours.to_dict()
    different = [
        f"{name} = {there[name]!r} there, {here[name]!r} here"
        for name in here
        if there[name] != here[name] and name not in _FREE_FIELDS
    ]
    if different:
        raise UserError(f"{path}: holds a model with another configuration: {'; '.join(different)}")


def read_config(path: str | os.PathLike[str]) -> GPTConfig:
    """The configuration in a weights file, without reading the weights.

    Args:
        path: a model.safetensors, or a run folder that holds one.

    Raises:
        UserError: the file is not there, is truncated, or was not written by fastgpt.
    """
    path = _weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: a safetensors file, but not fastgpt's: its metadata says format = {metadata.get('format')!r}, "
            f"and {FORMAT!r} is needed"
        )
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path}: version {metadata.get('version')!r} of the format; this fastgpt reads version {VERSION!r}"
        )
    try:
        values = json.loads(metadata.get("config", "null"))
        if not isinstance(values, dict):
            raise UserError("it is no JSON object")
        return GPTConfig.from_dict(values)
    except ValueError as error:
        raise UserError(f"{path}: the configuration in the file cannot be used: {error}") from error


def _weights_file(path: str | os.PathLike[str]) -> Path:
    """The weights file itself, where a run folder was given."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _read_tensors(path: Path, model: GPT, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The file's tensors, after checking that they are those of the model: same names, same shapes, floating dtypes."""
    expected = model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            if wrong := sorted(names ^ set(expected)):
                what = "is missing" if wrong[0] in expected else "is not part of the model"
                raise UserError(f"{path}: does not hold what its configuration says: tensor {wrong[0]!r} {what}")
            for name in expected:
                tensors[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise UserError(
                f"{path}: does not hold what its configuration says: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"and must be floating-point of shape {tuple(expected[name].shape)}"
            )
    return tensors


def _reason(error: Exception) -> str:
    """An operating system's error without its number and path; any other as it reads, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, SafetensorError):
        return UserError(f"{path}: truncated, or not a safetensors file at all ({_reason(error)})")
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file")
    return UserError(f"{path}: cannot be read: {_reason(error)}")
