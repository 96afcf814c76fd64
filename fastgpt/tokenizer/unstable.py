"""Which ids of a text stay the same whatever follows, and which sequences could stand in place of the others.

The last piece of a text may be the beginning of something longer, so its ids are not final. The result is that of
tiktoken's `encode_with_unstable`, whose search is a heuristic: white space before the last piece counts as unstable
with it, a token may straddle the end of the text, and a run of white space may come apart before its last character.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.tokenizer.encoding import Encoding

_BLANK = frozenset(b" \n\t")
# White_Space, by which the last character counts as such; str.isspace knows four more.
_WHITE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200B)}


def _starting_with(sorted_tokens: list[bytes], prefix: bytes) -> Iterator[bytes]:
    at = bisect_left(sorted_tokens, prefix)
    while at < len(sorted_tokens) and sorted_tokens[at].startswith(prefix):
        yield sorted_tokens[at]
        at += 1


def _last_character(data: bytes) -> tuple[str | None, int]:
    """The last character of data, None where it is no UTF-8, and how many bytes it has."""
    for size in range(1, min(4, len(data)) + 1):
        try:
            return data[-size:].decode(), size
        except UnicodeDecodeError:
            continue
    return None, 1


def unstable_completions(
    tokenizer: Encoding, ids: list[int], last_piece_ids: int, sorted_tokens: list[bytes]
) -> tuple[list[int], list[list[int]]]:
    """Splits the ids of a text.

    Args:
        tokenizer: gives bytes and ids.
        ids: of the text.
        last_piece_ids: how many of them belong to the last pre-token; 0 where a special token is last.
        sorted_tokens: all ordinary tokens, sorted as bytes.

    Returns:
        the stable ids, and sequences of ids any of which may go on from them; each covers at least the rest of the
        text.
    """
    if last_piece_ids == 0:
        return ids, []
    pieces = [tokenizer.decode_single_token_bytes(id) for id in ids]
    if _BLANK.issuperset(pieces[-last_piece_ids]):
        while last_piece_ids < len(ids) and _BLANK.issuperset(pieces[-last_piece_ids - 1]):
            last_piece_ids += 1
    stable, rest = ids[:-last_piece_ids], b"".join(pieces[-last_piece_ids:])

    completions: set[tuple[int, ...]] = {
        (tokenizer.encode_single_token(token),) for token in _starting_with(sorted_tokens, rest)
    }
    for at in range(1, len(rest)):
        for token in _starting_with(sorted_tokens, rest[at:]):
            whole = rest[:at] + token
            try:
                encoded = tokenizer.encode_ordinary(whole.decode())
            except UnicodeDecodeError:
                encoded = tokenizer.encode_piece(whole)
            sequence, length = [], 0
            for id in encoded:
                sequence.append(id)
                length += len(tokenizer.decode_single_token_bytes(id))
                if length >= len(rest):
                    break
            completions.add(tuple(sequence))
    last, size = _last_character(rest)
    if len(rest) > size and last is not None and last in _WHITE:
        completions.add((*tokenizer.encode_piece(rest[:-size]), *tokenizer.encode_piece(rest[-size:])))
    return stable, [list(sequence) for sequence in completions]
