"""The decoding half of the byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy.typing as npt

from fastgpt._bpe import Bpe
from fastgpt.tokenizer.stream import StreamDecoder


class Decoding:
    """From ids to text and bytes. An id that does not exist raises KeyError, one that is no integer TypeError."""

    _bpe: Bpe

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], errors: str = "replace") -> str:
        """The text of ids, a sequence of int or an integer array; `errors` is for bytes that are no UTF-8, as in
        bytes.decode.

        Raises:
            KeyError: an id is not in the vocabulary. TypeError: ids are no integers.
        """
        return self._bpe.decode(ids, errors)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[Any]) -> bytes:
        """The bytes of ids; raises as decode does."""
        return self._bpe.decode_bytes(ids)

    def decode_single_token_bytes(self, id: int) -> bytes:
        """The bytes of one token, special or not.

        Raises:
            KeyError: there is no such id.
        """
        return self._bpe.token_bytes(id)

    def decode_tokens_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each of the ids."""
        return [self._bpe.token_bytes(id) for id in ids]

    def decode_with_offsets(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of ids and where in it, in characters, each token begins.

        A token that begins inside a character begins, for this purpose, with that character.

        Raises:
            UnicodeDecodeError: the ids are no valid UTF-8.
        """
        offsets, length = [], 0
        pieces = self.decode_tokens_bytes(ids)
        for piece in pieces:
            offsets.append(max(0, length - (0x80 <= piece[0] < 0xC0)))
            length += sum(1 for byte in piece if not 0x80 <= byte < 0xC0)
        return b"".join(pieces).decode("utf-8", "strict"), offsets

    def decode_batch(
        self, batch: Sequence[Sequence[int]], *, errors: str = "replace", num_threads: int | None = None
    ) -> list[str]:
        """`decode` of several lists of ids. num_threads is accepted for tiktoken's sake; decoding is not worth
        threads."""
        return [self._bpe.decode(ids, errors) for ids in batch]

    def decode_bytes_batch(self, batch: Sequence[Sequence[int]], *, num_threads: int | None = None) -> list[bytes]:
        """`decode_bytes` of several lists of ids; num_threads as in decode_batch."""
        return [self._bpe.decode_bytes(ids) for ids in batch]

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come one at a time; it gives whole characters only."""
        return StreamDecoder(self._bpe.token_bytes)

    def stream_decode(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, whole characters only; joined, it is `decode` of them all."""
        decoder = self.stream_decoder()
        for id in ids:
            if piece := decoder.push(id):
                yield piece
        if piece := decoder.finish():
            yield piece
