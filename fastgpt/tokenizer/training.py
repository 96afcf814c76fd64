"""Feeding texts and files to the trainer in C++, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from fastgpt._bpe import Trainer, safe_cut
from fastgpt.tokenizer.patterns import resolve, splitter

_BLOCK_BYTES = 8 << 20


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


def train_merges(
    texts: Iterable[str | os.PathLike[str]],
    merges: int,
    pattern: str,
    special_tokens: Collection[str],
    num_threads: int,
    min_frequency: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[int, int]]:
    """The pairs that training joins, in order; ids 0 to 255 are bytes and pair i makes id 256 + i."""
    name, expression = resolve(pattern)
    trainer = Trainer(name, num_threads)
    waiting: list[str] = []
    waiting_characters = 0

    def flush() -> None:
        nonlocal waiting_characters
        if name is not None:
            trainer.feed(waiting)
        else:
            for text in waiting:
                begins, ends = splitter(expression).spans(text)
                trainer.feed_spans(text, begins, ends)
        waiting.clear()
        waiting_characters = 0

    for source in texts:
        if isinstance(source, str):
            parts: Iterable[str] = (source,)
        elif isinstance(source, os.PathLike):
            # A cut that suits the built-in patterns may not suit another: such a file is read whole.
            parts = read_parts(source) if name is not None else ("".join(read_parts(Path(source))),)
        else:
            raise TypeError(f"texts: got an item of type {type(source).__name__}, expected str or a path")
        for part in parts:
            held = [token for token in special_tokens if token in part]
            for piece, _ in split_special(part, held):
                waiting.append(piece)
                waiting_characters += len(piece)
            if waiting_characters >= _BLOCK_BYTES:
                flush()
    flush()
    return trainer.train(merges, min_frequency, progress)
