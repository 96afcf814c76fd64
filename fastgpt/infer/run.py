"""Reading a run folder, or another library's model: the weights and the tokenizer that belongs to them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT, load_model

if TYPE_CHECKING:
    from fastgpt.tokenizer import CharTokenizer, Tokenizer

HUB = "hf:"


def load_run(
    run: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> "tuple[GPT, Tokenizer | CharTokenizer]":
    """The model with the best validation loss of a run, in evaluation mode, and its tokenizer.

    Args:
        run: the folder that training wrote.
        device: where the weights go.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: the folder is not there, is not a run, has no weights yet, or one of its files cannot be used.

    Example:
        >>> model, tokenizer = load_run("runs/shakespeare")
    """
    from fastgpt.tokenizer import load_tokenizer

    run = Path(run)
    if not run.is_dir():
        raise UserError(
            f"{run}: {'not a folder' if run.exists() else 'no such folder'}; accepted: a run folder that training wrote"
        )
    for name, missing in (
        ("tokenizer.json", "it is not a run folder"),
        ("model.safetensors", "training has not saved a model yet"),
    ):
        if not (run / name).is_file():
            raise UserError(f"{run}: has no {name}: {missing}")
    try:
        tokenizer = load_tokenizer(run / "tokenizer.json")
    except ValueError as error:
        raise UserError(str(error)) from error
    model = load_model(run / "model.safetensors", device)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(
            f"{run}: tokenizer.json has {tokenizer.n_vocab} tokens and model.safetensors only {model.config.vocab_size}; "
            "they are not of one run"
        )
    return model, tokenizer


def load_pretrained(
    source: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> "tuple[GPT, Tokenizer | CharTokenizer]":
    """A pretrained model in evaluation mode and its tokenizer, from a run or from elsewhere.

    Args:
        source: a run folder; a folder of Hugging Face's with config.json and a tokenizer; a .gguf file; or
            "hf:OWNER/NAME" of the Hugging Face hub, which is downloaded.
        device: where the weights go.

    Returns:
        (model, tokenizer). Of a model from elsewhere either may know more ids than the other.

    Raises:
        UserError: as `load_run` and `GPT.from_pretrained`, or a model without a byte-level BPE tokenizer beside it.

    Example:
        >>> model, tokenizer = load_pretrained("SmolLM2.Q4_1.gguf")  # doctest: +SKIP
    """
    from fastgpt.model import load_gguf_tokenizer
    from fastgpt.model.huggingface import downloaded
    from fastgpt.tokenizer import Tokenizer

    name = os.fspath(source)
    path = downloaded(name.removeprefix(HUB)) if name.startswith(HUB) else Path(source)
    if not path.is_file() and not (path / "config.json").is_file():
        return load_run(path, device)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(
            f"{path}: has no tokenizer; accepted: a run folder, a folder of Hugging Face's or a .gguf file, which "
            "`GPT.save_pretrained` and `save_gguf` write"
        )
    try:
        tokenizer = load_gguf_tokenizer(path) if path.is_file() else Tokenizer.from_huggingface(path)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: its tokenizer: {error}") from error
    return GPT.from_pretrained(path).to(device), tokenizer
