"""Reading a run folder: the best weights and the tokenizer that belongs to them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgpt.errors import UserError
from fastgpt.model import GPT, load_model

if TYPE_CHECKING:
    from fastgpt.tokenizer import CharTokenizer, Tokenizer


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
