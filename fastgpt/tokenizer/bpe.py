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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastgpt._bpe import Bpe
from fastgpt.tokenizer.decoding import Decoding
from fastgpt.tokenizer.files import FORMAT, FORMAT_VERSION, read_json, write_json
from fastgpt.tokenizer.huggingface import read_huggingface, write_huggingface
from fastgpt.tokenizer.patterns import resolve, splitter
from fastgpt.tokenizer.texts import encode_file, split_special
from fastgpt.tokenizer.tiktoken_format import read_tiktoken, write_tiktoken
from fastgpt.tokenizer.training import train_merges
from fastgpt.tokenizer.unstable import unstable_completions

END_OF_TEXT = "<|endoftext|>"

Special = Literal["all"] | Collection[str]


class Tokenizer(Decoding):
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
        if self.pattern_name and type(self).encode_ordinary is Tokenizer.encode_ordinary:
            # For a short string a Python function in between takes a fifth of the time.
            self.__dict__["encode_ordinary"] = self._bpe.encode_ordinary
        self.special_tokens_set = set(self.special_tokens)
        self._special_ids = frozenset(self.special_tokens.values())

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.n_vocab} tokens, pattern {self.pattern_name or self.pattern!r})"

    # ---- the vocabulary

    @property
    def n_vocab(self) -> int:
        """The greatest id and one: what a model's embedding needs."""
        return self._bpe.slots

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

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all ordinary tokens, sorted as bytes."""
        return sorted(self._tokens)

    # ---- encoding

    def encode(
        self, text: str, allowed_special: Special = frozenset(), disallowed_special: Special = "all"
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any str.
            allowed_special: special tokens that become their ids where their text occurs; "all" for all of them.
            disallowed_special: special tokens whose text is an error; "all" for all that are not allowed, () for none:
                their text is then encoded like any other.

        Raises:
            ValueError: text holds the text of a disallowed special token. TypeError: text is no str.
        """
        allowed = self._check_special(text, allowed_special, disallowed_special)
        return (
            self._run(text, allowed).tolist() if allowed or not self.pattern_name else self._bpe.encode_ordinary(text)
        )

    def encode_to_numpy(
        self, text: str, allowed_special: Special = frozenset(), disallowed_special: Special = "all"
    ) -> npt.NDArray[np.uint32]:
        """`encode` with the ids as a uint32 array."""
        return self._run(text, self._check_special(text, allowed_special, disallowed_special))

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text; the text of special tokens is text like any other."""
        return self._bpe.encode_ordinary(text) if self.pattern_name else self._run(text, frozenset()).tolist()

    def encode_ordinary_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """`encode_ordinary` with the ids as a uint32 array, which is faster for long texts."""
        return self._bpe.encode_ordinary_numpy(text) if self.pattern_name else self._run(text, frozenset())

    encode_numpy = encode_ordinary_numpy

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of bytes, which need not be UTF-8: `decode_bytes` gives them back.

        Valid UTF-8 gets the ids of its text; a byte that belongs to no valid character is a symbol to the
        pre-tokenizer. With a regular expression that is not built in, data that is no UTF-8 is one pre-token.
        """
        if self.pattern_name:
            return self._bpe.encode_bytes(data)
        try:
            return self.encode_ordinary(bytes(data).decode())
        except UnicodeDecodeError:
            return self._bpe.encode_piece(data)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of the token, special or not, with exactly this text.

        Raises:
            KeyError: there is none.
        """
        if isinstance(text_or_bytes, str):
            if text_or_bytes in self.special_tokens:
                return self.special_tokens[text_or_bytes]
            token = text_or_bytes.encode("utf-8", "surrogatepass")
        elif isinstance(text_or_bytes, (bytes, bytearray)):
            token = bytes(text_or_bytes)
        else:
            raise TypeError(f"text_or_bytes: got {type(text_or_bytes).__name__}, expected str or bytes")
        if token in self._tokens:
            return self._tokens[token]
        special = self.special_tokens.get(token.decode("utf-8", "replace"))
        if special is None:
            raise KeyError(f"{text_or_bytes!r} is not one token")
        return special

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        num_threads: int | None = None,
        allowed_special: Special = frozenset(),
        disallowed_special: Special = "all",
    ) -> list[list[int]]:
        """`encode` of several texts, on up to num_threads threads (default: the machine's)."""
        texts = list(texts)
        allowed: frozenset[str] = frozenset()
        for text in texts:
            allowed = self._check_special(text, allowed_special, disallowed_special)
        if allowed:
            return [self._run(text, allowed).tolist() for text in texts]
        return self.encode_ordinary_batch(texts, num_threads=num_threads)

    def encode_ordinary_batch(self, texts: Sequence[str], *, num_threads: int | None = None) -> list[list[int]]:
        """`encode_ordinary` of several texts, on up to num_threads threads (default: the machine's)."""
        threads = _threads(num_threads)
        if self.pattern_name:
            return self._bpe.encode_batch(list(texts), threads)
        return [self.encode_ordinary(text) for text in texts]

    def encode_ordinary_batch_numpy(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        """The ids of several texts in one array.

        Returns:
            ids, uint32, and offsets, uint64 of one more than the texts: text i has ids[offsets[i]:offsets[i + 1]].
        """
        threads = _threads(num_threads)
        if self.pattern_name:
            return self._bpe.encode_batch_numpy(list(texts), threads)
        parts = [self._run(text, frozenset()) for text in texts]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
        return np.concatenate([np.empty(0, np.uint32), *parts]), offsets

    def count(self, text: str) -> int:
        """How many ids `encode_ordinary` gives for a text, in memory that does not grow with it."""
        return self._bpe.count(text) if self.pattern_name else len(self._run(text, frozenset()))

    def truncate(self, text: str, max_tokens: int) -> str:
        """The longest beginning of a text, in whole characters, that the first max_tokens ids of the text cover.

        `count` of it is at most max_tokens: where cutting a piece gives it more ids, it is cut further. Surrogates are
        replaced as in encoding.

        Raises:
            ValueError: max_tokens is negative.
        """
        if max_tokens < 0:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 0")
        text = without_surrogates(text)
        if self.pattern_name:
            kept = self._bpe.prefix_bytes(text, max_tokens)
            prefix = text if kept >= len(text.encode()) else text.encode()[:kept].decode("utf-8", "ignore")
        elif len(ids := self._run(text, frozenset())) <= max_tokens:
            return text
        else:
            prefix = self.decode_bytes(ids[:max_tokens]).decode("utf-8", "ignore")
        while self.count(prefix) > max_tokens:
            prefix = prefix[:-1]
        return prefix

    def encode_piece(self, piece: bytes) -> list[int]:
        """The ids of bytes taken as one pre-token."""
        return self._bpe.encode_piece(piece)

    def encode_with_unstable(
        self, text: str, allowed_special: Special = frozenset(), disallowed_special: Special = "all"
    ) -> tuple[list[int], list[list[int]]]:
        """The ids of a text that stay whatever follows it, and the sequences that may go on from them; as in tiktoken.

        For every sequence, the bytes of the stable ids and of the sequence begin with the text.
        """
        allowed = self._check_special(text, allowed_special, disallowed_special)
        text = without_surrogates(text)
        ids = self._run(text, allowed).tolist()
        *_, (last_part, _) = split_special(text, allowed)
        pieces = self.pretokens(last_part)
        last_piece_ids = len(self._bpe.encode_piece(pieces[-1].encode())) if pieces else 0
        return unstable_completions(self, ids, last_piece_ids, self.token_byte_values())

    def encode_file(
        self,
        path: str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        num_threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encodes a UTF-8 file into a file of ids, in bounded memory, and returns how many ids there are.

        The ids are little-endian, uint16 where n_vocab is at most 65536 and uint32 otherwise, with nothing before or
        after them; special tokens are text like any other. The file appears under its name when it is whole.

        Args:
            path: the text.
            out: the file of ids; replaced where it exists.
            num_threads: default the machine's.
            progress: called now and then with the bytes done and all bytes.

        Raises:
            ValueError: the file is not UTF-8. OSError: reading or writing failed.
        """
        return encode_file(self, path, out, _threads(num_threads), progress)

    def pretokens(self, text: str) -> list[str]:
        """The pieces that the pattern cuts a text into. Surrogates are replaced as in encoding."""
        text = without_surrogates(text)
        if self.pattern_name:
            data = text.encode()
            ends = self._bpe.pretokens(text).tolist()
            return [data[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]
        begins, span_ends = splitter(self.pattern).spans(text)
        return [text[begin:end] for begin, end in zip(begins.tolist(), span_ends.tolist(), strict=True)]

    def _check_special(self, text: str, allowed_special: Special, disallowed_special: Special) -> frozenset[str]:
        """The allowed special tokens; ValueError where the text holds a disallowed one."""
        every = frozenset(self.special_tokens)
        allowed = every if allowed_special == "all" else every & frozenset(allowed_special)
        if not isinstance(text, str):
            raise TypeError(f"text: got {type(text).__name__}, expected str")
        if disallowed_special == "all":
            found = self._bpe.find_special(text) if self.special_tokens else None
            if found is None or (found in allowed and not (self.special_tokens_set - allowed)):
                return allowed
            disallowed: Iterable[str] = self.special_tokens_set - allowed
        else:
            disallowed = disallowed_special
        for token in disallowed:
            if token and token in text:
                raise ValueError(
                    f"text: it holds {token!r}, a special token that is not allowed; pass it in allowed_special to get its id, or "
                    "disallowed_special=() to encode it as ordinary text"
                )
        return allowed

    def _run(self, text: str, allowed: frozenset[str]) -> npt.NDArray[np.uint32]:
        """The ids of a text, with some special tokens allowed."""
        if self.pattern_name:
            return self._bpe.encode_numpy(text, allowed) if allowed else self._bpe.encode_ordinary_numpy(text)
        text = without_surrogates(text)
        split = splitter(self.pattern)
        if not allowed:
            return self._bpe.encode_spans(text, *split.spans(text))
        parts: list[npt.NDArray[np.uint32]] = []
        for piece, special in split_special(text, allowed):
            parts.append(self._bpe.encode_spans(piece, *split.spans(piece)))
            if special is not None:
                parts.append(np.array([self.special_tokens[special]], dtype=np.uint32))
        return np.concatenate(parts)

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
        pairs = train_merges(sources, wanted, pattern, special, _threads(num_threads), min_frequency, progress)
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


def _threads(num_threads: int | None) -> int:
    """A number of threads, checked; the machine's where none is given."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads!r}, expected an int of at least 1")
    return num_threads


def without_surrogates(text: str) -> str:
    """The text as it is encoded: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Reads a tokenizer file of either kind: a Tokenizer or a CharTokenizer.

    Raises:
        ValueError: it is no tokenizer file; path and reason are named. OSError: it cannot be read.
    """
    from fastgpt.tokenizer.char import CharTokenizer

    return (CharTokenizer if read_json(path)["type"] == "char" else Tokenizer).load(Path(path))
