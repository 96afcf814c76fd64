"""The byte-level BPE tokenizer: text to ids and back, training, saving.

A text is cut into pre-tokens by a pattern, and inside each the neighbouring pairs of lowest rank are joined until none
is left (the maths is in csrc/bpe/merge.h, the training in csrc/bpe/trainer.h). Ids and methods are tiktoken's: for the
same vocabulary and pattern, `encode` gives the same ids, lone surrogates included (pairs are joined, single ones
replaced by U+FFFD). Unlike tiktoken, nothing panics: an id that does not exist raises KeyError, a wrong type TypeError.

Encoding and decoding may run in many Python threads at once; texts of more than 2 KB are encoded without the GIL.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt._bpe import Bpe
from fastgpt.tokenizer.encoding import Encoding, thread_count
from fastgpt.tokenizer.files import FORMAT, FORMAT_VERSION, read_json, write_json
from fastgpt.tokenizer.huggingface import read_huggingface, write_huggingface
from fastgpt.tokenizer.patterns import resolve
from fastgpt.tokenizer.tiktoken_format import read_tiktoken, write_tiktoken
from fastgpt.tokenizer.training import train_merges

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Encoding):
    """Byte-level BPE.

    Args:
        tokens: the bytes of every token and its id; the 256 single bytes must be among them. Without `merges`, the id
            is the rank.
        pattern: the pre-tokenizer, a name ("gpt2", "cl100k_base", "o200k_base", "llama3", "qwen2") or a regular
            expression.
        special_tokens: text of the special tokens and their ids; `encode` gives them only where it is allowed to. Of
            two with one id, decoding gives the first.
        name: what to call it.
        merges: pairs of ids in order of rank; then only these pairs join, as in Hugging Face's files.
        whole_first: a pre-token that is a token is taken whole, without looking at ranks. True is tiktoken's rule.

    Raises:
        ValueError: no valid vocabulary; the message says which token. TypeError: a wrong type.

    Example:
        >>> tokenizer = Tokenizer.train(["low lower lowest " * 10], 270)
        >>> tokenizer.decode(tokenizer.encode("lower"))
        'lower'
    """

    def __init__(
        self,
        tokens: Mapping[bytes, int],
        *,
        pattern: str = "gpt2",
        special_tokens: Mapping[str, int] | None = None,
        name: str = "bpe",
        merges: Sequence[tuple[int, int]] | None = None,
        whole_first: bool = True,
    ) -> None:
        self.pattern_name, self.pattern = resolve(pattern)
        self.name = name
        self.special_tokens: dict[str, int] = dict(special_tokens or {})
        self.whole_first = whole_first
        for text, id in self.special_tokens.items():
            if not isinstance(text, str) or not isinstance(id, int) or isinstance(id, bool) or id < 0:
                raise TypeError(f"special_tokens: got {text!r}: {id!r}, expected str: int of at least 0")
        self._tokens = dict(tokens)
        self._merges = list(merges) if merges is not None else []
        self._bpe = Bpe(self._tokens, list(self.special_tokens.items()), self._merges, self.pattern_name, whole_first)
        if self.pattern_name:
            # For a short string a Python function in between takes a fifth of the time.
            for method in ("encode_ordinary", "encode_ordinary_numpy"):
                if getattr(type(self), method) is getattr(Tokenizer, method):
                    self.__dict__[method] = getattr(self._bpe, method)
        self.special_tokens_set = set(self.special_tokens)
        self._special_ids = frozenset(self.special_tokens.values())

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.n_vocab} tokens, pattern {self.pattern_name or self.pattern!r})"

    # ---- the vocabulary

    @property
    def max_token_value(self) -> int:
        """The greatest id."""
        return self.n_vocab - 1

    @property
    def eot_token(self) -> int | None:
        """The id of <|endoftext|>, None where there is no such special token."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def tokens(self) -> dict[bytes, int]:
        """A copy of the ordinary tokens: bytes -> id."""
        return dict(self._tokens)

    @property
    def merges(self) -> list[tuple[int, int]]:
        """A copy of the list of merges it was made with; empty where ids are ranks."""
        return list(self._merges)

    def is_special_token(self, id: int) -> bool:
        """Whether an id is a special token's."""
        return id in self._special_ids

    # ---- making and keeping

    @classmethod
    def train(
        cls,
        texts: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
        vocab_size: int,
        *,
        pattern: str = "gpt2",
        special_tokens: Iterable[str] = (END_OF_TEXT,),
        num_threads: int | None = None,
        min_frequency: int = 1,
        progress: Callable[[int, int], None] | None = None,
        name: str = "bpe",
    ) -> Tokenizer:
        """Trains a vocabulary.

        Ids 0 to 255 are the bytes; every step joins the most frequent pair of neighbouring ids inside pre-tokens into
        the next id, as minbpe defines it; of equally frequent pairs, the one with the smaller left id and then the
        smaller right id. Special tokens get the last ids; their text is left out of what is counted. The result depends
        on neither the order of the texts nor the number of threads.

        Args:
            texts: strings, and paths of UTF-8 files, which are read in parts and may be larger than memory.
            vocab_size: how many ids in all; fewer come out where no pair occurs min_frequency times.
            pattern: as for Tokenizer.
            special_tokens: their texts.
            num_threads: default the machine's.
            min_frequency: pairs that are rarer are not joined.
            progress: called now and then with the merges done and the merges wanted.

        Raises:
            ValueError: vocab_size is below 256 and the special tokens, or a file is not UTF-8. OSError: a file cannot
                be read.
        """
        special = list(dict.fromkeys(special_tokens))
        if isinstance(special_tokens, str):
            raise TypeError(f"special_tokens: got the str {special_tokens!r}, expected several strings")
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
            raise TypeError(f"vocab_size: got {type(vocab_size).__name__}, expected int")
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at least {256 + len(special)} (the 256 bytes and the special tokens)"
            )
        if min_frequency < 1:
            raise ValueError(f"min_frequency: got {min_frequency}, expected at least 1")
        sources = [texts] if isinstance(texts, (str, os.PathLike)) else texts
        wanted = vocab_size - 256 - len(special)
        pairs = train_merges(sources, wanted, pattern, special, thread_count(num_threads), min_frequency, progress)
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [b""] * len(pairs)
        for at, (left, right) in enumerate(pairs, 256):
            tokens[at] = tokens[left] + tokens[right]
        special_ids = {text: len(tokens) + at for at, text in enumerate(special)}
        ranks = {token: id for id, token in enumerate(tokens)}
        return cls(ranks, pattern=pattern, special_tokens=special_ids, name=name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer as one JSON file (fastgpt/tokenizer/files.py), which `load` and `load_tokenizer`
        read."""
        by_id: list[str | None] = [None] * (max(self._tokens.values()) + 1)
        for token, id in self._tokens.items():
            by_id[id] = base64.b64encode(token).decode("ascii")
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "type": "bpe",
            "name": self.name,
            "pattern": self.pattern,
            "whole_first": self.whole_first,
            "special_tokens": self.special_tokens,
            "tokens": by_id,
        }
        if self._merges:
            content["merges"] = self._merges
        write_json(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is something else or damaged; path and reason are named. OSError: it cannot be read.
        """
        content = read_json(path, "bpe")
        try:
            tokens = {
                base64.b64decode(token, validate=True): id
                for id, token in enumerate(content["tokens"])
                if token is not None
            }
            if len(tokens) != sum(token is not None for token in content["tokens"]):
                raise ValueError("a token is there twice")
            merges = [(int(left), int(right)) for left, right in content.get("merges", ())]
            return cls(
                tokens,
                pattern=content["pattern"],
                special_tokens=content["special_tokens"],
                name=str(content.get("name", "bpe")),
                merges=merges or None,
                whole_first=bool(content.get("whole_first", True)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise ValueError(f"{os.fspath(path)}: damaged tokenizer: {error}") from error

    @classmethod
    def from_tiktoken(
        cls,
        path: str | os.PathLike[str],
        pattern: str,
        special_tokens: Mapping[str, int] | None = None,
        *,
        name: str | None = None,
    ) -> Tokenizer:
        """Reads a .tiktoken vocabulary; pattern and special tokens, which the file does not hold, are given.

        Raises:
            ValueError: it is no such file; path, line and reason are named. OSError: it cannot be read.
        """
        tokens = read_tiktoken(path)
        try:
            return cls(tokens, pattern=pattern, special_tokens=special_tokens, name=name or Path(path).stem)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def save_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Writes the ordinary tokens as a .tiktoken file. Pattern and special tokens have no place in it.

        Raises:
            ValueError: this tokenizer joins by a list of merges, which such a file cannot say.
        """
        if self._merges:
            raise ValueError("save_tiktoken: this tokenizer has a list of merges; a .tiktoken file only has ranks")
        write_tiktoken(path, self._tokens)

    @classmethod
    def from_huggingface(cls, path: str | os.PathLike[str], *, name: str | None = None) -> Tokenizer:
        """Reads a byte-level BPE tokenizer.json, or a folder with it or with vocab.json and merges.txt.

        What is read and what is refused: fastgpt/tokenizer/huggingface.py.

        Raises:
            ValueError: it is something else; path and reason are named. OSError: a file cannot be read.
        """
        arguments = read_huggingface(path)
        try:
            return cls(arguments.pop("tokens"), name=name or Path(path).stem, **arguments)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def save_huggingface(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json for Hugging Face's libraries, which then give the same ids."""
        write_huggingface(self, path)

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self._tokens, self.pattern, self.special_tokens, self.name, self._merges or None, self.whole_first)
        return _rebuild, state


def _rebuild(
    tokens: dict[bytes, int],
    pattern: str,
    special_tokens: dict[str, int],
    name: str,
    merges: list[tuple[int, int]] | None,
    whole_first: bool,
) -> Tokenizer:
    return Tokenizer(
        tokens, pattern=pattern, special_tokens=special_tokens, name=name, merges=merges, whole_first=whole_first
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Reads a tokenizer file of either kind: a Tokenizer or a CharTokenizer.

    Raises:
        ValueError: it is no tokenizer file; path and reason are named. OSError: it cannot be read.
    """
    from fastgpt.tokenizer.char import CharTokenizer

    return (CharTokenizer if read_json(path)["type"] == "char" else Tokenizer).load(Path(path))
