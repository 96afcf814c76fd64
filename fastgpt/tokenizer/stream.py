"""Decoding one token at a time without breaking characters.

A token of a byte-level tokenizer may end in the middle of a UTF-8 character; its bytes are held back until the
character is whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns ids into text as they come; what `push` and `finish` return, joined, is `decode` of all the ids.

    Args:
        token_bytes: gives the bytes of an id, and raises KeyError for one that does not exist.

    Example:
        >>> decoder = tokenizer.stream_decoder()
        >>> text = "".join(decoder.push(id) for id in ids) + decoder.finish()
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The characters that this id completes; may be empty. Bytes that can be no character become U+FFFD."""
        return self._decoder.decode(self._token_bytes(id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was begun and not ended, else nothing. The decoder then starts
        anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
