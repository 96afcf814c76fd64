"""Encodings by name: gpt2, r50k_base, p50k_base, p50k_edit, cl100k_base, o200k_base, o200k_harmony.

The vocabulary of each is a .tiktoken file with a known SHA-256, looked for in this order:

1. the folder FASTGPT_VOCAB_DIR, under its own name (cl100k_base.tiktoken); a file there with another checksum is an
error; 2. tiktoken's cache (TIKTOKEN_CACHE_DIR, DATA_GYM_CACHE_DIR, or data-gym-cache in the folder for temporary
files); 3. this library's cache ($XDG_CACHE_HOME/fastgpt/vocab, by default ~/.cache/fastgpt/vocab); 4. the network. What
was downloaded is kept, in 3, only after its checksum was right.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.tokenizer.bpe import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.files import write_atomically
from fastgpt.tokenizer.tiktoken_format import parse_tiktoken

_URL = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
_TIMEOUT_S = 60
_SHA256 = {
    "r50k_base": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "p50k_base": "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}


@dataclass(frozen=True)
class Encoding:
    """What makes an encoding: vocabulary file, pattern, special tokens."""

    vocabulary: str
    pattern: str
    special_tokens: dict[str, int] = field(hash=False)


def _fim(first: int) -> dict[str, int]:
    return {f"<|fim_{part}|>": first + i for i, part in enumerate(("prefix", "middle", "suffix"))}


def _harmony() -> dict[str, int]:
    named = {
        "<|startoftext|>": 199998,
        END_OF_TEXT: 199999,
        "<|return|>": 200002,
        "<|constrain|>": 200003,
        "<|channel|>": 200005,
        "<|start|>": 200006,
        "<|end|>": 200007,
        "<|message|>": 200008,
        "<|call|>": 200012,
        "<|endofprompt|>": 200018,
    }
    # As in tiktoken, 200018 has a second name, <|reserved_200018|>; it decodes to the first.
    taken = set(named.values()) - {200018}
    return named | {f"<|reserved_{id}|>": id for id in range(200000, 201088) if id not in taken}


ENCODINGS: dict[str, Encoding] = {
    "gpt2": Encoding("r50k_base", "gpt2", {END_OF_TEXT: 50256}),
    "r50k_base": Encoding("r50k_base", "gpt2", {END_OF_TEXT: 50256}),
    "p50k_base": Encoding("p50k_base", "gpt2", {END_OF_TEXT: 50256}),
    "p50k_edit": Encoding("p50k_base", "gpt2", {END_OF_TEXT: 50256, **_fim(50281)}),
    "cl100k_base": Encoding(
        "cl100k_base", "cl100k_base", {END_OF_TEXT: 100257, **_fim(100258), "<|endofprompt|>": 100276}
    ),
    "o200k_base": Encoding("o200k_base", "o200k_base", {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "o200k_harmony": Encoding("o200k_base", "o200k_base", _harmony()),
}


def list_encoding_names() -> list[str]:
    """The names that get_encoding knows."""
    return list(ENCODINGS)


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt" / "vocab"


def _tiktoken_cache_dir() -> Path:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _read_checked(path: Path, sha256: str) -> bytes | None:
    """The file's content where it is there and right, else None."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def vocabulary_bytes(name: str) -> bytes:
    """The content of a vocabulary file, from the first of the places above that has it.

    Raises:
        ValueError: the file in FASTGPT_VOCAB_DIR is another one. FileNotFoundError: it is nowhere and cannot be
            downloaded; the message says which file to put where.
    """
    sha256, url, file_name = _SHA256[name], _URL.format(name), f"{name}.tiktoken"
    given = os.environ.get("FASTGPT_VOCAB_DIR")
    if given and (path := Path(given) / file_name).exists():
        data = _read_checked(path, sha256)
        if data is None:
            raise ValueError(f"{path}: not the vocabulary {name}: its SHA-256 is not {sha256}")
        return data
    own = _cache_dir() / file_name
    for path in (_tiktoken_cache_dir() / hashlib.sha1(url.encode()).hexdigest(), own):
        if (data := _read_checked(path, sha256)) is not None:
            return data
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data = response.read()
        reason = "" if hashlib.sha256(data).hexdigest() == sha256 else "what came has another checksum"
    except (OSError, urllib.error.URLError, ValueError) as error:
        data, reason = b"", str(error)
    if reason:
        raise FileNotFoundError(
            f"the vocabulary {name} is not on this machine and could not be downloaded ({reason}); put {url} as "
            f"{file_name} into the folder that FASTGPT_VOCAB_DIR names, or into {own.parent}"
        )
    own.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(own, data)
    return data


@functools.cache
def get_encoding(name: str) -> Tokenizer:
    """The tokenizer of an encoding, made once a process.

    Raises:
        ValueError: an unknown name. FileNotFoundError: its vocabulary cannot be had; see vocabulary_bytes.

    Example:
        >>> get_encoding("cl100k_base").encode("hello world")
        [15339, 1917]
    """
    if name not in ENCODINGS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(ENCODINGS)}")
    encoding = ENCODINGS[name]
    tokens = parse_tiktoken(vocabulary_bytes(encoding.vocabulary))
    return Tokenizer(tokens, pattern=encoding.pattern, special_tokens=encoding.special_tokens, name=name)
