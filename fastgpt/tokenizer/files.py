"""The tokenizer's own file: one JSON object.

    format          "fastgpt-tokenizer"
    version         1
    type            "bpe" or "char"
    name            free text
    characters      (char) the vocabulary as one string; the id is the place
    pattern         (bpe) the pre-tokenizer: a regular expression
    tokens          (bpe) the tokens' bytes in base64, by id; null where there is no such id
    merges          (bpe, may be missing) pairs of ids in order of rank; without it, the id is the rank
    whole_first     (bpe) a pre-token that is a token is not merged
    special_tokens  (bpe) text -> id

Files are written beside their place and renamed, so a reader sees the old one or the new one whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

FORMAT = "fastgpt-tokenizer"
FORMAT_VERSION = 1


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes an object as JSON, ASCII only, so that any str survives."""
    write_atomically(path, (json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n").encode("ascii"))


def read_json(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Reads a tokenizer file of ours and checks what it says it is.

    Args:
        path: the file.
        kind: "bpe" or "char"; None for either.

    Raises:
        ValueError: naming the path and the reason. OSError: the file cannot be read.
    """
    name = os.fspath(path)
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not a tokenizer file, it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{name}: not a tokenizer file of this library, it has no "format": "{FORMAT}"')
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{name}: tokenizer file of version {content.get('version')!r}, this library reads {FORMAT_VERSION}"
        )
    if content.get("type") not in ("bpe", "char"):
        raise ValueError(f'{name}: tokenizer of type {content.get("type")!r}, expected "bpe" or "char"')
    if kind is not None and content["type"] != kind:
        raise ValueError(f'{name}: a tokenizer of type "{content["type"]}", expected "{kind}"')
    return content
