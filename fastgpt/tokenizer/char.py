"""The character tokenizer: every distinct character of a text is a token, ids in order of code point.

NumPy lookups in one table by code point: a million characters take milliseconds. Characters that the vocabulary lacks
are an error; it has no special tokens and no end-of-text token.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.tokenizer.files import FORMAT_VERSION, read_json, write_json
from fastgpt.tokenizer.stream import StreamDecoder


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected str")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class CharTokenizer:
    """One token a character.

    Args:
        characters: the vocabulary; the id of a character is its place. Each once.
        name: what to call it.

    Example:
        >>> tokenizer = CharTokenizer.train("hello")
        >>> tokenizer.encode("hole")
        [1, 3, 2, 0]
    """

    special_tokens: dict[str, int]
    eot_token: int | None = None

    def __init__(self, characters: str, *, name: str = "char") -> None:
        code_points = _code_points(characters)
        if len(code_points) == 0:
            raise ValueError("characters: got an empty string, expected at least one character")
        if len(np.unique(code_points)) != len(code_points):
            raise ValueError("characters: got a character twice, expected each once")
        self.name = name
        self.characters = characters
        self.special_tokens = {}
        self._code_points = code_points
        self._ids = np.full(int(code_points.max()) + 1, -1, dtype=np.int32)
        self._ids[code_points] = np.arange(len(code_points), dtype=np.int32)

    @classmethod
    def train(cls, text: str | Iterable[str], *, name: str = "char") -> CharTokenizer:
        """The tokenizer of all the characters in a text, or in several.

        Raises:
            ValueError: there are none.
        """
        seen = np.zeros(0x110000, dtype=bool)
        for part in [text] if isinstance(text, str) else text:
            seen[_code_points(part)] = True
        code_points = np.flatnonzero(seen)
        if len(code_points) == 0:
            raise ValueError("text: got no characters to make a vocabulary of")
        return cls("".join(map(chr, code_points.tolist())), name=name)

    def __repr__(self) -> str:
        return f"CharTokenizer({self.n_vocab} characters)"

    @property
    def n_vocab(self) -> int:
        """How many ids there are."""
        return len(self._code_points)

    def encode_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of a text, uint32.

        Raises:
            ValueError: a character is not in the vocabulary.
        """
        code_points = _code_points(text)
        ids = self._ids[np.minimum(code_points, len(self._ids) - 1)]
        bad = (ids < 0) | (code_points >= len(self._ids))
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"text: the character {text[at]!r} at position {at} is not among the {self.n_vocab} of this character tokenizer"
            )
        return ids.astype(np.uint32)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text as a list; see encode_numpy. There are no special tokens to allow.

        Raises:
            ValueError: as encode_numpy, or allowed_special names a token.
        """
        if allowed_special and allowed_special != "all":
            raise ValueError(
                f"allowed_special: got {sorted(allowed_special)}, a character tokenizer has no special tokens"
            )
        return self.encode_numpy(text).tolist()

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode_numpy(text))

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of ids.

        Raises:
            KeyError: an id is not in the vocabulary. TypeError: ids are no integers.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return ""
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise TypeError(f"ids: got {type(ids).__name__}, expected a sequence of int")
        bad = (array < 0) | (array >= self.n_vocab)
        if bad.any():
            raise KeyError(f"token id {array[np.argmax(bad)]} is not in the vocabulary")
        return self._code_points[array].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[Any]) -> bytes:
        """The text of ids as UTF-8; a lone surrogate becomes `?`, as it has no UTF-8."""
        return self.decode(ids).encode("utf-8", "replace")

    def decode_single_token_bytes(self, id: int) -> bytes:
        """The UTF-8 of one token.

        Raises:
            KeyError: the id is not in the vocabulary.
        """
        return self.decode_bytes([id])

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self.decode_single_token_bytes)

    def stream_decode(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of each id, as the ids come."""
        for id in ids:
            yield self.decode([id])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer as one JSON file, which `load_tokenizer` reads."""
        content = {
            "format": "fastgpt-tokenizer",
            "version": FORMAT_VERSION,
            "type": "char",
            "name": self.name,
            "characters": self.characters,
        }
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CharTokenizer:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is something else or damaged. OSError: it cannot be read.
        """
        content = read_json(path, "char")
        try:
            return cls(content["characters"], name=str(content.get("name", "char")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: damaged character tokenizer: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_characters, (self.characters, self.name)


def _from_characters(characters: str, name: str) -> CharTokenizer:
    return CharTokenizer(characters, name=name)
