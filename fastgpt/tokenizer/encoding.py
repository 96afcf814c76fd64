"""The encoding half of the byte-level BPE tokenizer.

Encoding may run in many Python threads at once; texts of more than 2 KB are encoded without the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastgpt.tokenizer.decoding import Decoding
from fastgpt.tokenizer.patterns import splitter
from fastgpt.tokenizer.texts import encode_file, split_special, without_surrogates
from fastgpt.tokenizer.unstable import unstable_completions

Special = Literal["all"] | Collection[str]


class Encoding(Decoding):
    """From text to ids. A text is any str; surrogates that have no UTF-8 are replaced as tiktoken does."""

    _tokens: dict[bytes, int]
    pattern_name: str | None
    pattern: str
    special_tokens: dict[str, int]
    special_tokens_set: set[str]

    @property
    def n_vocab(self) -> int:
        """The greatest id and one: what a model's embedding needs."""
        return self._bpe.slots

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all ordinary tokens, sorted as bytes."""
        return sorted(self._tokens)

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
        threads = thread_count(num_threads)
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
        threads = thread_count(num_threads)
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
            prefix = self._bpe.decode_bytes(ids[:max_tokens]).decode("utf-8", "ignore")
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
        return encode_file(self, path, out, thread_count(num_threads), progress)

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


def thread_count(num_threads: int | None) -> int:
    """A number of threads, checked; the machine's where none is given."""
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads: got {num_threads!r}, expected an int of at least 1")
    return num_threads
