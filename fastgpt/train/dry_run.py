"""`fastgpt train --dry-run`: what a configuration comes to, without making a run."""

import math
from pathlib import Path

import torch

from fastgpt.data import load_corpus
from fastgpt.data.shards import is_prepared, read_manifest
from fastgpt.errors import UserError
from fastgpt.tokenizer import load_tokenizer
from fastgpt.train.config import Config
from fastgpt.train.estimate import report
from fastgpt.train.evaluate import choose_dtype
from fastgpt.train.run import choose_device, model_config


def vocabulary(config: Config) -> tuple[int, int | None, str]:
    """(size of the vocabulary, training tokens or None, how they are known) of a configuration, without training a tokenizer."""
    if is_prepared(config.data.source):
        manifest = read_manifest(Path(config.data.source))
        return manifest["vocab_size"], manifest["train"]["tokens"], "of the prepared folder"
    if config.tokenizer.path is not None:
        try:
            return load_tokenizer(config.tokenizer.path).n_vocab, None, "of the saved tokenizer"
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer.path: {error}") from error
    if config.tokenizer.type == "bpe":
        return config.tokenizer.vocab_size, None, "of the tokenizer that would be trained, at most"
    try:
        corpus = load_corpus(config.data.source, config.data.val_fraction)
    except UserError as error:
        return 256, None, f"assumed, as the text cannot be read ({error})"
    characters = set().union(*corpus.train, *corpus.val)
    return len(characters), sum(map(len, corpus.train)), "the characters of the text"


def dry_run(config: Config, world_size: int = 1) -> int:
    """Print what `fastgpt train` with this configuration would take; returns the exit code.

    Args:
        config: of the run.
        world_size: processes that would share it, each with a device like this one.

    Raises:
        UserError: a batch that they cannot share.
    """
    if config.train.batch_size % world_size:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}; accepted is a multiple of the {world_size} processes"
        )
    device = choose_device(config.train.device)
    dtype = choose_dtype(config.train.dtype, device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    n_vocab, n_tokens, known = vocabulary(config)
    model = model_config(config, n_vocab)
    print(
        f"model: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block {model.block_size}; "
        f"{str(dtype).removeprefix('torch.')} on {device}"
    )
    print(f"vocabulary: {n_vocab:,} ({known})" + (f", {n_tokens:,} training tokens" if n_tokens else ""))
    max_steps = config.train.max_steps
    if config.train.epochs is not None and n_tokens is not None:
        step_tokens = config.train.batch_size * config.train.grad_accum_steps * model.block_size
        max_steps = math.ceil(config.train.epochs * n_tokens / step_tokens)
    for line in report(model, config.train, dtype, device, max_steps, world_size):
        print(line, flush=True)
    return 0
