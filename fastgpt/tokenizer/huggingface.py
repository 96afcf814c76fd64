"""Hugging Face's files of byte-level BPE tokenizers: tokenizer.json, and vocab.json with merges.txt.

Their tokens are written with one printable character a byte (GPT-2's alphabet, `byte_alphabet`), their ranks are a list
of pairs. What changes ids and is not byte-level BPE with one splitting pattern (normalizers, several splits, unknown
tokens, prefixes) is refused with a message that names it. What only adds to the ids afterwards (post-processors:
begin-of-text tokens and the like) is not read: `encode` gives the text's ids. Added tokens become special tokens,
whether the file calls them special or not.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.tokenizer.files import write_atomically

if TYPE_CHECKING:
    from fastgpt.tokenizer.bpe import Tokenizer

# Forms of the patterns for their engine (Oniguruma), where `{1,3}+` and `$` have other meanings than in tiktoken's.
_EXPORTED_PATTERNS = {
    "cl100k_base": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
}


@functools.lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 wrote its vocabulary: printable Latin-1 bytes stand for themselves, the others, in
    order, are U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _to_bytes(token: str) -> bytes:
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError as error:
        raise ValueError(
            f"the token {token!r} has a character outside of the byte alphabet; not a byte-level vocabulary"
        ) from error


@functools.lru_cache(maxsize=1)
def _characters() -> dict[int, str]:
    """Latin-1 code point -> character of the alphabet, for str.translate."""
    return {byte: character for character, byte in byte_alphabet().items()}


def _to_characters(token: bytes) -> str:
    return token.decode("latin-1").translate(_characters())


def _pattern_of(pre_tokenizer: Any) -> str:
    """The splitting pattern of a tokenizer.json's pre_tokenizer."""
    steps = (
        pre_tokenizer.get("pretokenizers", [])
        if pre_tokenizer and pre_tokenizer["type"] == "Sequence"
        else [pre_tokenizer]
    )
    patterns, byte_level = [], False
    for step in steps:
        kind = step["type"] if step else None
        if kind == "ByteLevel":
            byte_level = True
            if step.get("add_prefix_space"):
                raise ValueError(
                    "the pre-tokenizer puts a space before the text (add_prefix_space), which is not supported"
                )
            if step.get("use_regex", True):
                patterns.append("gpt2")
        elif kind == "Split":
            if (
                "Regex" not in step["pattern"]
                or step.get("behavior") not in ("Isolated", "Removed")
                or ((step["behavior"] == "Removed") != bool(step.get("invert")))
            ):
                raise ValueError(f"the pre-tokenizer has a Split that is not supported: {step}")
            patterns.append(step["pattern"]["Regex"])
        else:
            raise ValueError(f"the pre-tokenizer {kind} is not supported, expected ByteLevel, or Split and ByteLevel")
    if not byte_level:
        raise ValueError("the pre-tokenizer has no ByteLevel step; not a byte-level vocabulary")
    if len(patterns) != 1:
        raise ValueError(f"the pre-tokenizer splits {len(patterns)} times, expected one pattern")
    return patterns[0]


def _pairs(merges: list[Any], vocabulary: dict[str, int]) -> list[tuple[int, int]]:
    pairs = []
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or parts[0] not in vocabulary or parts[1] not in vocabulary:
            raise ValueError(f"merge {rank}: got {merge!r}, expected two tokens of the vocabulary")
        pairs.append((vocabulary[parts[0]], vocabulary[parts[1]]))
    return pairs


def _from_tokenizer_json(content: dict[str, Any]) -> dict[str, Any]:
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, expected BPE")
    if content.get("normalizer"):
        raise ValueError(f"it has a normalizer ({content['normalizer'].get('type')}), which is not supported")
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its model has {key} = {model[key]!r}, which is not supported")
    if model.get("byte_fallback"):
        raise ValueError("its model has byte_fallback, which is not supported")
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return {
        "vocabulary": model["vocab"],
        "merges": model["merges"],
        "added": added,
        "pattern": _pattern_of(content.get("pre_tokenizer")),
        "whole_first": bool(model.get("ignore_merges")),
    }


def read_huggingface(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments for Tokenizer of a tokenizer.json, or of a folder with one or with vocab.json and merges.txt.

    Raises:
        ValueError: naming the path and what is wrong or not supported. OSError: a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        folder, path = path, path / "tokenizer.json"
        if not path.exists():
            path = folder / "vocab.json"
    try:
        content = json.loads(path.read_bytes())
        if path.name == "vocab.json":
            lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            eot = "<|endoftext|>"
            added = {eot: content[eot]} if eot in content else {}
            parts = {"vocabulary": content, "merges": merges, "added": added, "pattern": "gpt2", "whole_first": False}
        else:
            parts = _from_tokenizer_json(content)
        vocabulary: dict[str, int] = parts["vocabulary"]
        tokens = {_to_bytes(token): id for token, id in vocabulary.items() if token not in parts["added"]}
        return {
            "tokens": tokens,
            "merges": _pairs(parts["merges"], vocabulary),
            "pattern": parts["pattern"],
            "special_tokens": parts["added"],
            "whole_first": parts["whole_first"],
        }
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a byte-level BPE tokenizer file: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def all_pairs(tokens: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a token, in order of the result: joining by content, written as a list of
    pairs."""
    pairs = []
    for token, _ in sorted(tokens.items(), key=lambda item: item[1]):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs += sorted(
            (split for split in splits if split[0] in tokens and split[1] in tokens),
            key=lambda split: (tokens[split[0]], tokens[split[1]]),
        )
    return pairs


def write_huggingface(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer.json that Hugging Face's `tokenizers` reads and that gives the same ids."""
    tokens = tokenizer.tokens
    by_id = {id: token for token, id in tokens.items()}
    given = tokenizer.merges
    pairs = [(by_id[left], by_id[right]) for left, right in given] if given else all_pairs(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if tokenizer.pattern_name == "gpt2":
        pre_tokenizer: dict[str, Any] = byte_level | {"use_regex": True}
    else:
        expression = _EXPORTED_PATTERNS.get(tokenizer.pattern_name or "", tokenizer.pattern)
        split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": text, **flags}
            for text, id in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": tokenizer.whole_first,
            "vocab": {_to_characters(token): id for token, id in sorted(tokens.items(), key=lambda item: item[1])},
            "merges": [[_to_characters(left), _to_characters(right)] for left, right in pairs],
        },
    }
    write_atomically(path, json.dumps(content, ensure_ascii=False).encode())
