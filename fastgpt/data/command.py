"""`fastgpt data prepare` and `fastgpt data verify`."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgpt.data.prepare import PROGRESS, prepare
from fastgpt.data.reader import BAD, NEWLINES, Reader
from fastgpt.data.shards import MANIFEST, verify_shards
from fastgpt.data.sources import Source, find_sources
from fastgpt.errors import UserError
from fastgpt.terminal import command_parser, counted, say

TRAIN_BYTES = 100_000_000  # of text that a new tokenizer learns from: more changes its rarest merges only
LOG_INTERVAL_S = 15.0


def main(arguments: Sequence[str]) -> int:
    """`fastgpt data`."""
    actions = {"prepare": _prepare, "verify": _verify}
    parser = command_parser(
        "data",
        "Token shards for training.\n\n  prepare  text, JSONL, Parquet and folders into shards\n"
        "  verify   compare shards with their checksums\n\n`fastgpt data ACTION --help` says more.",
    )
    if not arguments or arguments[0].startswith("-"):
        parser.parse(arguments)
        parser.print_help()
        return 2
    if arguments[0] not in actions:
        raise UserError(f"unknown action {arguments[0]!r} of fastgpt data; there are: {', '.join(actions)}")
    return actions[arguments[0]](arguments[1:])


def _prepare(arguments: Sequence[str]) -> int:
    parser = command_parser(
        "data prepare",
        "Turn text into token shards that `fastgpt train --data FOLDER` reads.\n"
        "After Ctrl-C or a crash the same command goes on where it was.",
    )
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files and folders of text, .jsonl, .parquet and .arrow; hf:NAME: a data set of the Hugging Face hub",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the shards go")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        help="an encoding such as gpt2, or a saved tokenizer.json (default: train one on the first sources)",
    )
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        default=8192,
        help="size of a tokenizer that is trained (default: %(default)s)",
    )
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="field of JSONL and column of Parquet with the text (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction", metavar="X", type=float, default=0.01, help="share held out (default: %(default)s)"
    )
    parser.add_argument(
        "--bad",
        choices=BAD,
        default="stop",
        help="what to do with input that is not right: end with an error, leave "
        "it out and count it, or put U+FFFD for bytes that are not UTF-8 (default: %(default)s)",
    )
    parser.add_argument(
        "--newlines", choices=NEWLINES, default="unix", help="CR LF becomes LF, or stays (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-tokens", metavar="N", type=int, default=100_000_000, help="tokens in a shard (default: %(default)s)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads of the tokenizer (default: one a core)")
    given = parser.parse(arguments)
    if not 0 < given.val_fraction < 1:
        raise UserError(f"--val-fraction is {given.val_fraction:g}; accepted is above 0 and below 1")
    for name in ("shard_tokens", "threads"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; accepted is at least 1")
    reader = Reader(given.val_fraction, given.text_field, given.bad, given.newlines)
    sources, out = find_sources(given.sources), Path(given.out)
    tokenizer = _tokenizer(given.tokenizer, given.vocab_size, sources, out, reader)
    bar = _Bar()
    try:
        manifest = prepare(
            sources,
            tokenizer,
            out,
            reader,
            shard_tokens=given.shard_tokens,
            threads=given.threads,
            progress=bar.update,
            say=say,
        )
    except KeyboardInterrupt:
        say(f"\nstopped; the same command goes on from the last note in {out}")
        raise
    finally:
        bar.close()
    if reader.skipped:
        say(f"{reader.skipped:,} left out; the first: {reader.first_skipped}")
    for split, words in (("train", "to train"), ("val", "held out")):
        part = manifest[split]
        print(
            f"{part['tokens']:,} tokens {words}, {counted(part['documents'], 'document')}, {part['bytes']:,} bytes, "
            f"{counted(len(part['shards']), 'shard')}"
        )
    print(f"train on it: fastgpt train --data {out}")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = command_parser("data verify", "Read all shards of a folder and compare them with their checksums.")
    parser.add_argument("folder", metavar="FOLDER", help="what `fastgpt data prepare` made")
    given = parser.parse(arguments)
    n_bytes = verify_shards(Path(given.folder), say)
    print(f"{given.folder}: {n_bytes:,} bytes, all as they were written")
    return 0


def _tokenizer(given: str | None, vocab_size: int, sources: Sequence[Source], out: Path, reader: Reader) -> Any:
    from fastgpt.tokenizer import Tokenizer, load_tokenizer
    from fastgpt.tokenizer.registry import get_encoding, list_encoding_names

    try:
        if given is not None:
            if given in list_encoding_names():
                return get_encoding(given)
            if not Path(given).is_file():
                raise UserError(
                    f"--tokenizer is {given!r}; accepted is a saved tokenizer.json or one of "
                    f"{', '.join(list_encoding_names())}"
                )
            return load_tokenizer(given)
        if any((out / name).is_file() for name in (PROGRESS, MANIFEST)):  # going on: the one that was trained then
            return load_tokenizer(out / "tokenizer.json")
        say(f"training a tokenizer of {vocab_size:,} tokens")
        trial = Reader(reader.val_fraction, reader.text_field, reader.bad, reader.newlines)
        trial.plan(sources)
        return Tokenizer.train(list(_sample(trial, sources)), vocab_size)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"--tokenizer: {error}") from error


def _sample(reader: Reader, sources: Sequence[Source]) -> Iterator[str]:
    """The first TRAIN_BYTES of text that trains."""
    size = 0
    for source in sources:
        for piece in reader.read(source):
            if size >= TRAIN_BYTES:
                return
            if not piece.val:
                size += len(piece.text)
                yield piece.text


class _Bar:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.last = time.monotonic()

    def update(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True)
            self.bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.last >= LOG_INTERVAL_S:
            self.last = now
            print(
                f"{done / max(total, 1):.0%} of {total / 1e6:,.0f} MB, {tokens:,} tokens", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """Leave the bar where it stands."""
        if self.bar is not None:
            self.bar.close()
