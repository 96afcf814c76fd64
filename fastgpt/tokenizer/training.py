"""Feeding texts and files to the trainer in C++, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from fastgpt._bpe import Trainer
from fastgpt.tokenizer.patterns import resolve, splitter
from fastgpt.tokenizer.texts import read_parts, split_special

_WAITING_CHARACTERS = 8 << 20  # small texts are counted together, so that threads have something to share


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
            if waiting_characters >= _WAITING_CHARACTERS:
                flush()
    flush()
    return trainer.train(merges, min_frequency, progress)
