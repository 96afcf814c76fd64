"""Pre-tokenizer patterns: the regular expressions that cut a text before byte pairs are merged.

The patterns below are also written by hand in C++ (csrc/bpe/scan_token.h), which is what runs; their text is here to
recognise them in other people's files. Any other expression runs through the `regex` package, slower, with tiktoken's
meaning: pieces that match are encoded, text between matches is dropped, and `$` is the end of the text and nothing
else. The package's own Unicode version decides about characters that were assigned after Unicode 16, which is the
version of the patterns in C++ and of tiktoken.
"""

from __future__ import annotations

import functools
import re

import numpy as np

# tiktoken's texts of the patterns, and the forms that Llama 3 and Qwen 2 ship in tokenizer.json.
PATTERNS: dict[str, str] = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
    "o200k_base": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
    "llama3": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
    "qwen2": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}

# Other names, and other texts with the same matches.
_ALIASES: dict[str, str] = {
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "cl100k": "cl100k_base",
    "o200k": "o200k_base",
    "gpt4": "cl100k_base",
    "gpt4o": "o200k_base",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
}
_BY_TEXT = {text: name for name, text in PATTERNS.items()}


def resolve(pattern: str) -> tuple[str | None, str]:
    """The built-in name of a pattern, None where there is none, and its regular expression.

    Args:
        pattern: a name of PATTERNS, another known name for one of them, or a regular expression.

    Raises:
        TypeError: pattern is not a str. ValueError: it is no regular expression, or an empty one.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: got {type(pattern).__name__}, expected str")
    if not pattern:
        raise ValueError(f"pattern: got an empty string, expected one of {', '.join(PATTERNS)} or a regular expression")
    name = pattern if pattern in PATTERNS else _ALIASES.get(pattern, _BY_TEXT.get(pattern))
    if name is not None:
        return name, PATTERNS[name]
    if re.fullmatch(
        r"\w[\w-]*", pattern
    ):  # a word is a misspelt name much sooner than an expression that matches one word
        raise ValueError(f"pattern: got {pattern!r}, expected one of {', '.join(PATTERNS)} or a regular expression")
    Splitter(pattern)
    return None, pattern


def _python_syntax(pattern: str) -> str:
    """The pattern with `$` as Rust's regex has it, the very end; Python's also matches before a last line feed."""
    out, escaped, in_class = [], False, 0
    for character in pattern:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "[":
            in_class = 1
        elif character == "]":
            in_class = 0
        elif character == "$" and not in_class:
            character = r"\Z"
        out.append(character)
    return "".join(out)


class Splitter:
    """Cuts texts with any regular expression.

    Example:
        >>> Splitter(r"\\w+|\\s").spans("a bc")
        (array([0, 1, 2], dtype=uint64), array([1, 2, 4], dtype=uint64))
    """

    def __init__(self, pattern: str) -> None:
        import regex  # only here: the built-in patterns do without it

        self.pattern = pattern
        try:
            self._compiled = regex.compile(_python_syntax(pattern))
        except regex.error as error:
            raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from error

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Where the matches in text begin and end, in characters, as uint64; empty matches are left out."""
        spans = [match.span() for match in self._compiled.finditer(text)]
        array = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        array = array[array[:, 0] < array[:, 1]]
        return np.ascontiguousarray(array[:, 0]), np.ascontiguousarray(array[:, 1])


@functools.lru_cache(maxsize=32)
def splitter(pattern: str) -> Splitter:
    """The Splitter of a pattern, compiled once."""
    return Splitter(pattern)
