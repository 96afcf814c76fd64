"""The command line of the tokenizer: `fastgpt tokenizer train | encode | decode | inspect`.

A tokenizer is given by name (an encoding of fastgpt.tokenizer.registry) or by path: a file that `train` wrote, a .tiktoken file with
--pattern, a tokenizer.json or its folder. Text comes from the command line, from --file, or from standard input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.tokenizer.bpe import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.registry import ENCODINGS, get_encoding

COLOURS = (44, 42, 45, 43, 46)  # backgrounds of neighbouring tokens
Make = Callable[[str, str], argparse.ArgumentParser]


def open_tokenizer(name: str, pattern: str | None = None) -> Tokenizer:
    """The tokenizer that a command line names.

    Args:
        name: an encoding, or the path of a tokenizer's file or folder.
        pattern: for a .tiktoken file, which has none.

    Raises:
        UserError: there is none, or it cannot be read; says why.
    """
    path = Path(name)
    try:
        if name in ENCODINGS:
            return get_encoding(name)
        if path.suffix == ".tiktoken":
            if pattern is None:
                raise UserError(f"{name}: a .tiktoken file has no pattern; give one with --pattern")
            return Tokenizer.from_tiktoken(path, pattern)
        if path.is_dir():
            return Tokenizer.from_huggingface(path)
        if not path.exists():
            raise UserError(f"tokenizer {name!r}: no such file, and no encoding; there are: {', '.join(ENCODINGS)}")
        content = json.loads(path.read_bytes())
        theirs = isinstance(content, dict) and "model" in content
        return Tokenizer.from_huggingface(path) if theirs else Tokenizer.load(path)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def read_text(words: Sequence[str], file: str | None) -> str:
    """The text of a command line: its words, a file, or standard input."""
    if words and file is not None:
        raise UserError("text is given both as words and by --file; give one of them")
    if words:
        return " ".join(words)
    try:
        return Path(file).read_bytes().decode() if file is not None else sys.stdin.buffer.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file or 'standard input'}: {error}") from error


def visible(token: bytes) -> str:
    """A token as one line of text; bytes that are no whole character as \\xNN.

    >>> visible(b" a\\n"), visible(b"\\xe2\\x82")
    (' a\\\\n', '\\\\xe2\\\\x82')
    """
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def coloured(pieces: Sequence[bytes], colour: bool) -> str:
    """Tokens one after the other: on backgrounds in turns, or between bars where colours are off."""
    if not colour:
        return "|" + "|".join(visible(piece) for piece in pieces) + "|"
    lines = []
    for at, piece in enumerate(pieces):
        lines.append(f"\x1b[{COLOURS[at % len(COLOURS)]};30m{visible(piece)}\x1b[0m")
        lines.append("\n" * piece.count(b"\n"))
    return "".join(lines)


def report(tokenizer: Tokenizer, text: str, colour: bool, limit: int) -> str:
    """What `inspect` prints of a text and of the vocabulary."""
    ids = tokenizer.encode_ordinary(text)
    size = len(tokenizer.decode_bytes(ids))
    pieces = [tokenizer.decode_single_token_bytes(id) for id in ids]
    lines = [repr(tokenizer)]
    if ids:
        lines += [coloured(pieces[:limit], colour)]
        lines += [] if len(ids) <= limit else [f"... and {len(ids) - limit:,} tokens more (--limit)"]
        lines += [" ".join(map(str, ids[:limit]))]
        lines += [
            f"{len(text):,} characters, {size:,} bytes, {len(tokenizer.pretokens(text)):,} pre-tokens, {len(ids):,} tokens",
            f"{len(ids) / size:.3f} tokens per byte, {size / len(ids):.2f} bytes per token",
        ]
    ordinary = tokenizer.tokens
    longest = sorted(ordinary, key=lambda token: (-len(token), ordinary[token]))[:10]
    lines += ["longest tokens:"] + [
        f"  {ordinary[token]:>7}  {len(token):>4} bytes  {visible(token)}" for token in longest
    ]
    if ids:
        used = set(ids)
        unused = sorted(id for id in ordinary.values() if id not in used)
        lines += [f"unused by this text: {len(unused):,} of {len(ordinary):,} tokens; the first ones:"]
        by_id = {id: token for token, id in ordinary.items()}
        lines += [f"  {id:>7}  {visible(by_id[id])}" for id in unused[:10]]
    lines += [f"special tokens: {', '.join(f'{text} {id}' for text, id in tokenizer.special_tokens.items()) or 'none'}"]
    return "\n".join(lines)


def _train(make: Make, arguments: Sequence[str]) -> int:
    parser = make("train", "Train a byte-level BPE vocabulary on text files, which may be larger than memory.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens in all")
    parser.add_argument("--out", required=True, metavar="FILE", help="the tokenizer's file to write")
    parser.add_argument("--pattern", default="gpt2", metavar="NAME", help="name or regular expression (default: gpt2)")
    parser.add_argument(
        "--special", action="append", metavar="TEXT", help=f"a special token, repeatable (default: {END_OF_TEXT})"
    )
    parser.add_argument("--min-frequency", type=int, default=1, metavar="N", help="of a pair (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the machine's")
    given = _parse(parser, arguments)
    try:
        tokenizer = Tokenizer.train(
            [Path(file) for file in given.files],
            given.vocab_size,
            pattern=given.pattern,
            special_tokens=[END_OF_TEXT] if given.special is None else given.special,
            min_frequency=given.min_frequency,
            num_threads=given.threads,
            name=Path(given.out).stem,
        )
        tokenizer.save(given.out)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f"{given.out}: {tokenizer.n_vocab:,} tokens", file=sys.stderr)
    return 0


def _with_tokenizer(make: Make, command: str, text: str) -> argparse.ArgumentParser:
    parser = make(command, text)
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="an encoding's name, a tokenizer's file or folder")
    parser.add_argument("--pattern", metavar="NAME", help="the pattern of a .tiktoken file (default: none)")
    parser.add_argument("--file", metavar="FILE", help="read this (default: standard input where no words are given)")
    return parser


def _encode(make: Make, arguments: Sequence[str]) -> int:
    parser = _with_tokenizer(make, "encode", "Print the ids of a text.")
    parser.add_argument("text", nargs="*", metavar="TEXT")
    parser.add_argument("--allow-special", action="store_true", help="special tokens get their ids (default: are text)")
    parser.add_argument("--json", action="store_true", help="print a JSON list (default: ids between spaces)")
    given = _parse(parser, arguments)
    tokenizer, text = open_tokenizer(given.tokenizer, given.pattern), read_text(given.text, given.file)
    allowed: Any = "all" if given.allow_special else ()
    ids = tokenizer.encode(text, allowed_special=allowed, disallowed_special=())
    print(json.dumps(ids) if given.json else " ".join(map(str, ids)))
    return 0


def _decode(make: Make, arguments: Sequence[str]) -> int:
    parser = _with_tokenizer(make, "decode", "Write the text of ids, byte for byte.")
    parser.add_argument("ids", nargs="*", metavar="ID")
    given = _parse(parser, arguments)
    words = read_text(given.ids, given.file).translate(str.maketrans("[],", "   ")).split()
    try:
        data = open_tokenizer(given.tokenizer, given.pattern).decode_bytes([int(word) for word in words])
    except (ValueError, KeyError) as error:
        raise UserError(f"ids: {error.args[0]}") from error
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return 0


def _inspect(make: Make, arguments: Sequence[str]) -> int:
    parser = _with_tokenizer(
        make, "inspect", "Show how a text is cut, tokens per byte, the vocabulary's longest and unused tokens."
    )
    parser.add_argument("text", nargs="*", metavar="TEXT")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: auto")
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="tokens to show (default: 500)")
    given = _parse(parser, arguments)
    colour = given.color == "always" or (given.color == "auto" and sys.stdout.isatty())
    tokenizer, text = open_tokenizer(given.tokenizer, given.pattern), read_text(given.text, given.file)
    print(report(tokenizer, text, colour, max(given.limit, 1)))
    return 0


COMMANDS = {
    "train": (_train, "train a vocabulary on text files"),
    "encode": (_encode, "print the ids of a text"),
    "decode": (_decode, "write the text of ids"),
    "inspect": (_inspect, "show how a text is cut, and the vocabulary"),
}


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """With fastgpt's own parser, its check for unknown options."""
    parse: Callable[[Sequence[str]], argparse.Namespace] = getattr(parser, "parse", parser.parse_args)
    return parse(arguments)


def main(arguments: Sequence[str], make: Make) -> int:
    """Run one command.

    Args:
        arguments: those after `fastgpt tokenizer`.
        make: gives the parser of a command from its name and what it does.

    Raises:
        UserError: something given cannot be used.
    """
    lines = "\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items())
    if not arguments or arguments[0] not in COMMANDS:
        parser = make("", f"Train, use and look into a BPE tokenizer.\n\ncommands:\n{lines}")
        if arguments and arguments[0] in ("-h", "--help"):
            parser.print_help()
            return 0
        raise UserError(f"tokenizer: got {arguments[0] if arguments else 'nothing'}; there are: {', '.join(COMMANDS)}")
    return COMMANDS[arguments[0]][0](make, arguments[1:])
