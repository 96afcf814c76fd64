"""Texts before they are encoded: surrogates, special tokens, files in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastgpt._bpe import safe_cut

if TYPE_CHECKING:
    from fastgpt.tokenizer.encoding import Encoding

_BLOCK_BYTES = 8 << 20


def without_surrogates(text: str) -> str:
    """The text as it is encoded: surrogate pairs joined, lone surrogates replaced by U+FFFD."""
    if not isinstance(text, str):
        raise TypeError(f"text: got {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def split_special(text: str, tokens: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """The pieces of a text between special tokens, each with the token that follows it; None after the last piece.

    Of tokens that begin at the same place, the longest counts.
    """
    import re

    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
    begin = 0
    for match in pattern.finditer(text) if tokens else ():
        yield text[begin : match.start()], match.group()
        begin = match.end()
    yield text[begin:], None


def read_parts(path: str | os.PathLike[str]) -> Iterator[str]:
    """The text of a UTF-8 file in parts of some MB that end where every built-in pattern has a boundary.

    Raises:
        ValueError: the file is not UTF-8; path and position are named. OSError: it cannot be read.
    """
    buffer, read_bytes = b"", 0
    with open(path, "rb") as file:
        while True:
            block = file.read(max(_BLOCK_BYTES, len(buffer)))  # without a place to cut, ever more
            buffer += block
            cut = safe_cut(buffer, len(buffer)) if block else len(buffer)
            if cut:
                try:
                    yield buffer[:cut].decode()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{os.fspath(path)}: not UTF-8 at byte {read_bytes + error.start}") from error
                buffer, read_bytes = buffer[cut:], read_bytes + cut
            if not block:
                return


def encode_file(
    tokenizer: Encoding,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    num_threads: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """See Tokenizer.encode_file."""
    dtype = "<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"
    total, done, count = os.path.getsize(path), 0, 0
    target = Path(out)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    parts: Iterable[str] = read_parts(path)
    if tokenizer.pattern_name is None:
        parts = ("".join(parts),)
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                ids, _ = tokenizer.encode_ordinary_batch_numpy([part], num_threads=num_threads)
                file.write(ids.astype(dtype).data)
                count += len(ids)
                done += len(part.encode())
                if progress is not None:
                    progress(done, total)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count
