"""A run folder: made as a whole or not at all, opened again for a resume.

    RUN/config.yaml          the full configuration
        tokenizer.json       the tokenizer
        data/                token files (train.bin, val.bin, meta.json)
        checkpoints/         the last two checkpoints and a pointer to the newest
        model.safetensors    the best weights by validation loss
        metrics.jsonl        one line for each evaluation
        loss.png             the same as a picture
        summary.json         what the run came to, written at its end

A run is prepared in a hidden folder beside its place and renamed when everything is there: text read and long enough, tokenizer
trained, tokens written, model configuration valid. A start that fails, for a bad file, a full disk or Ctrl-C, leaves nothing.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.data import TokenFiles, load_corpus, open_tokens, write_tokens
from fastgpt.data.corpora import Corpus
from fastgpt.data.loader import check_length
from fastgpt.data.shards import is_prepared, verify_shards
from fastgpt.data.tokens import link_shards, token_dtype
from fastgpt.errors import UserError
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from fastgpt.train.config import LENGTHS, Config, apply, check, read_yaml
from fastgpt.train.files import check_space, explain_writing, replace_text

KEEP_CHECKPOINTS = 2
FIXED_SECTIONS = ("data", "tokenizer", "model")


@dataclass
class Run:
    """A run folder that is complete.

    Attributes:
        folder: its path.
        config: what config.yaml holds.
        tokenizer: a Tokenizer or CharTokenizer.
        tokens: the token files, memory-mapped.
    """

    folder: Path
    config: Config
    tokenizer: Any
    tokens: TokenFiles

    def model_config(self) -> GPTConfig:
        """The model's configuration, with the tokenizer's vocabulary."""
        return model_config(self.config, self.tokenizer.n_vocab)


def model_config(config: Config, vocab_size: int) -> GPTConfig:
    """GPTConfig from the section `model`; raises UserError where the model refuses a value."""
    try:
        return GPTConfig(vocab_size=vocab_size, **dataclasses.asdict(config.model))
    except ValueError as error:
        raise UserError(f"model.{error}") from error


def choose_device(name: str) -> torch.device:
    """The torch device of `train.device`; 'auto' is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"train.device is {name!r}; accepted is 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"train.device is {name!r}; accepted is 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"train.device is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def free_folder(source: str) -> Path:
    """runs/<corpus>-N with the lowest free N."""
    known = source in ("stdlib", "shakespeare")
    stem = source if known else "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(source).resolve().stem)
    number = 1
    while (folder := Path("runs") / f"{stem.strip('-') or 'text'}-{number}").exists():
        number += 1
    return folder


def _check_out(out: Path) -> None:
    """Raise UserError unless a run can be made at `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; --out takes a folder that does not exist or is empty")
    if (out / "config.yaml").exists():
        raise UserError(f"{out} already holds a run; go on with --resume {out}, or give another folder with --out")
    if any(out.iterdir()):
        raise UserError(f"the folder {out} is not empty; --out takes a folder that does not exist or is empty")


def _check_text(corpus: Corpus, block_size: int) -> None:
    """A first look before any work: no tokenizer makes more tokens than a text has bytes."""
    for what, documents in (("training", corpus.train), ("validation", corpus.val)):
        size = sum(len(text.encode()) + 1 for text in documents)
        if size < block_size + 1:
            raise UserError(
                f"the {what} text of {corpus.description} has {size:,} bytes, too few for model.block_size {block_size}; "
                "give a longer text or a smaller block size"
            )


def disk_estimate(config: Config, corpus_bytes: int, vocab_size: int | None = None) -> int:
    """About how many bytes a run writes at most: tokens, the best weights, and the checkpoints with one in the making."""
    char = config.tokenizer.type == "char" and config.tokenizer.path is None
    vocab_size = vocab_size or (256 if char else config.tokenizer.vocab_size)
    with torch.device("meta"):
        n_params = GPT(model_config(config, vocab_size)).n_params()
    tokens = corpus_bytes * token_dtype(vocab_size).itemsize // (1 if char else 2)
    weights = 4 * n_params
    return tokens + 2 * weights + (KEEP_CHECKPOINTS + 1) * 3 * weights + 2_000_000


def _make_tokenizer(config: Config, corpus: Corpus, say: Callable[[str], None]) -> Any:
    options = config.tokenizer
    if options.path is not None:
        try:
            return load_tokenizer(options.path)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer.path: {error}") from error
    if options.type == "char":
        # The vocabulary is every character of the text, held-out part included: without this a rare character there has no id.
        characters = {"\n"} if len(corpus.train) > 1 or len(corpus.val) > 1 else set()
        return CharTokenizer.train("".join(sorted(characters.union(*corpus.train, *corpus.val))))
    started = time.monotonic()
    try:
        tokenizer = Tokenizer.train(corpus.train, options.vocab_size, pattern=options.pattern)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be trained: {error}") from error
    say(f"tokenizer: {tokenizer.n_vocab:,} byte-level BPE tokens, trained in {time.monotonic() - started:.1f} s")
    return tokenizer


def start_run(config: Config, out: Path | None, say: Callable[[str], None]) -> Run:
    """Prepare a new run.

    Args:
        config: the full configuration.
        out: the run folder; None takes the next free runs/<corpus>-N.
        say: receives lines for the user.

    Raises:
        UserError: anything the user gave does not work; nothing is left on the disk.
    """
    out = free_folder(config.data.source) if out is None else out
    _check_out(out)
    choose_device(config.train.device)
    model_config(config, max(config.tokenizer.vocab_size, 1))
    if is_prepared(config.data.source):
        return _start_prepared(config, out, say)
    corpus = load_corpus(config.data.source, config.data.val_fraction)
    say(f"text: {corpus.description}")
    for note in corpus.notes:
        say(f"text: {note}")
    _check_text(corpus, config.model.block_size)
    check_space(out, disk_estimate(config, corpus.n_bytes), f"the run {out}")

    def fill(folder: Path) -> Any:
        tokenizer = _make_tokenizer(config, corpus, say)
        _write_run(folder, config, corpus, tokenizer)
        return tokenizer

    return _make_folder(config, out, fill, say)


def _start_prepared(config: Config, out: Path, say: Callable[[str], None]) -> Run:
    """A run on the shards of a prepared folder, which it reads where they are."""
    source = Path(config.data.source)
    size = verify_shards(source)
    say(f"text: the prepared folder {source}, {size:,} bytes, as they were written")
    own = str((source / "tokenizer.json").resolve())
    if config.tokenizer.path not in (None, own):
        raise UserError(f"tokenizer.path: {source} has its own tokenizer; leave it out")
    config.tokenizer.path = own
    tokenizer = _make_tokenizer(config, Corpus(source.name, "", [], []), say)
    check_space(out, disk_estimate(config, 0, tokenizer.n_vocab), f"the run {out}")

    def fill(folder: Path) -> Any:
        (folder / "data").mkdir()
        tokenizer.save(folder / "tokenizer.json")
        link_shards(folder / "data", source)
        _finish_files(folder, config)
        return tokenizer

    return _make_folder(config, out, fill, say)


def _make_folder(config: Config, out: Path, fill: Callable[[Path], Any], say: Callable[[str], None]) -> Run:
    """Have `fill` write the files into a temporary folder and return the tokenizer, then give it its name."""
    made = [place for place in (out, *out.parents) if not place.exists()][
        1:
    ]  # parents that this call makes, innermost first
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with explain_writing(out):
            temporary.mkdir(parents=True)
            tokenizer = fill(temporary)
            os.rename(temporary, out)  # onto nothing or an empty folder; anything else is an error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        raise
    run = Run(out, config, tokenizer, open_tokens(out / "data"))
    train, val = run.tokens.meta["train"], run.tokens.meta["val"]
    say(
        f"tokens: {train['tokens']:,} to train, {val['tokens']:,} held out, vocabulary {tokenizer.n_vocab:,}, "
        f"{run.tokens.bytes_per_token('val'):.2f} bytes a token"
    )
    return run


def _write_run(folder: Path, config: Config, corpus: Corpus, tokenizer: Any) -> None:
    (folder / "data").mkdir()
    tokenizer.save(folder / "tokenizer.json")
    try:
        write_tokens(folder / "data", tokenizer, {"train": corpus.train, "val": corpus.val}, source=corpus.description)
    except (KeyError, ValueError) as error:
        raise UserError(f"the tokenizer cannot encode the text: {error}") from error
    _finish_files(folder, config)


def _finish_files(folder: Path, config: Config) -> None:
    tokens = open_tokens(folder / "data")
    check_length(tokens.train, config.model.block_size, "training")
    check_length(tokens.val, config.model.block_size, "validation")
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")


def open_run(folder: Path, layers: Sequence[Mapping[str, Any]], overrides: Mapping[str, str]) -> Run:
    """Open a run for a resume.

    Args:
        folder: the run folder.
        layers: values of a preset and a file, to put over the run's own configuration.
        overrides: values of the command line, over all of them.

    Raises:
        UserError: no run there, a damaged one, or values that would make it another run: those of the data, the tokenizer and the
            model cannot change, nor can a time budget that has been turned into steps.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}: no such folder")
    if not path.exists():
        raise UserError(f"there is no run at {folder}: it has no config.yaml")
    config, stored = Config(), Config()
    apply(config, read_yaml(path), from_text=False)
    apply(stored, read_yaml(path), from_text=False)
    for layer in layers:
        apply(config, layer)
    apply(config, overrides, from_text=True)
    check(config)
    for section in FIXED_SECTIONS:
        there, here = dataclasses.asdict(getattr(stored, section)), dataclasses.asdict(getattr(config, section))
        for name in there:
            if here[name] != there[name]:
                raise UserError(
                    f"{section}.{name} is {here[name]!r}, but the run {folder} was started with {there[name]!r}; "
                    "a resume goes on with the same model and text: leave it out, or start a new run with --out"
                )
    for name in LENGTHS[1:]:
        if getattr(config.train, name) not in (None, getattr(stored.train, name)):
            raise UserError(f"train.{name} cannot change on a resume; give the new length as train.max_steps")
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise UserError(f"the run {folder} is damaged: tokenizer.json: {error}") from error
    tokens = open_tokens(folder / "data")
    if tokens.meta["vocab_size"] != tokenizer.n_vocab:
        raise UserError(
            f"the run {folder} is damaged: tokenizer.json has {tokenizer.n_vocab:,} tokens, "
            f"data/meta.json says {tokens.meta['vocab_size']:,}"
        )
    return Run(folder, config, tokenizer, tokens)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for one training process; the lock leaves no file and ends with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"another process is training in {folder}; wait for it, or stop it first") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def write_config(run: Run) -> None:
    """config.yaml, where a resume has changed something in it. Called once nothing can refuse the resume any more."""
    path = run.folder / "config.yaml"
    text = run.config.to_yaml()
    if path.read_text(encoding="utf-8") != text:
        with explain_writing(path):
            replace_text(path, text)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """summary.json, atomically."""

    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
