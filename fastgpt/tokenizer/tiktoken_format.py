"""tiktoken's vocabulary files: a line a token, its bytes in base64, a space, its rank."""

from __future__ import annotations

import binascii
import os
from collections.abc import Mapping
from pathlib import Path

from fastgpt.tokenizer.files import write_atomically


def read_tiktoken(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """The tokens of a .tiktoken file and their ranks.

    Raises:
        ValueError: naming the path, the line and the reason; an empty file too. OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return parse_tiktoken(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not a tiktoken vocabulary: {error}") from error


def parse_tiktoken(data: bytes) -> dict[bytes, int]:
    """The tokens of the content of a .tiktoken file; ValueError with the line and the reason."""
    tokens: dict[bytes, int] = {}
    lines = [line for line in data.splitlines() if line]
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            tokens[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError as error:
            message = f"line {number}: got {line[:60]!r}, expected base64, a space and a number ({error})"
            raise ValueError(message) from error
    if not tokens:
        raise ValueError("it is empty")
    if len(tokens) != len(lines) or len(set(tokens.values())) != len(lines):
        raise ValueError("a token or a rank is there twice")
    return tokens


def write_tiktoken(path: str | os.PathLike[str], tokens: Mapping[bytes, int]) -> None:
    """Writes tokens in order of rank."""
    lines = [
        binascii.b2a_base64(token, newline=False) + b" %d\n" % rank
        for token, rank in sorted(tokens.items(), key=lambda item: item[1])
    ]
    write_atomically(path, b"".join(lines))
