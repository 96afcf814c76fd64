"""`fastgpt data prepare`: any amount of text into token shards, resumable at the last note it took.

One thread reads and cuts documents, the tokenizer encodes a batch of pieces on all its threads, the ids are appended to the shard
that is open. Batches depend on the sources alone, so the shards are the same bytes for any number of threads and after any number of
stops.

Every JOURNAL_S seconds the open shards are flushed to the disk and progress.json is replaced: the place in the sources, the finished
shards, the length of the open ones. A run that was killed cuts the open shards back to that length and goes on. manifest.json is
written last.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgpt.data.reader import Piece, Reader
from fastgpt.data.shards import FORMAT, MANIFEST, file_sha256, read_manifest
from fastgpt.data.sources import Source, signature
from fastgpt.data.tokens import token_dtype
from fastgpt.errors import UserError
from fastgpt.train.files import check_space, explain_writing, replace_text

BATCH_BYTES = 16 * 2**20
BATCH_PIECES = 8192
JOURNAL_S = 5.0
PROGRESS = "progress.json"
SPLITS = ("train", "val")


class _Split:
    """The shards of one split: a finished list and one open file."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, state: dict[str, Any]) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = state.get("shards", [])
        self.documents, self.bytes = state.get("documents", 0), state.get("bytes", 0)
        self.open_tokens = state.get("open_tokens", 0)
        self.file: BinaryIO | None = None
        self.digest = hashlib.sha256()
        if self.open_tokens:
            self._reopen()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}.bin"

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards) + self.open_tokens

    def _reopen(self) -> None:
        """Go on with the shard that was open: what was written after the last note is cut off."""
        size = self.open_tokens * self.dtype.itemsize
        if not self.path.is_file() or self.path.stat().st_size < size:
            raise UserError(f"{self.path} is shorter than {PROGRESS} says; remove {self.folder} and start again")
        self.file = open(self.path, "r+b")  # noqa: SIM115 - closed with its shard
        self.file.truncate(size)
        while block := self.file.read(2**22):
            self.digest.update(block)

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self.file is None:
                self.file, self.digest, self.open_tokens = open(self.path, "wb"), hashlib.sha256(), 0  # noqa: SIM115
            here = ids[: self.shard_tokens - self.open_tokens]
            data = np.ascontiguousarray(here, dtype=self.dtype).data
            self.file.write(data)
            self.digest.update(data)
            self.open_tokens += len(here)
            ids = ids[len(here) :]
            if self.open_tokens == self.shard_tokens:
                self.close()

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Finish the open shard."""
        if self.file is None:
            return
        self.flush()
        self.file.close()
        shard = {"file": self.path.name, "tokens": self.open_tokens, "sha256": self.digest.hexdigest()}
        self.shards.append(shard)
        self.file, self.open_tokens = None, 0

    def state(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "open_tokens": self.open_tokens,
            "shards": list(self.shards),
        }


def _batches(reader: Reader, sources: Sequence[Source], place: dict[str, int]) -> Iterator[tuple[list[Piece], dict]]:
    """Pieces of about BATCH_BYTES with the place after them; a batch never ends within a record."""
    batch: list[Piece] = []
    size = 0
    for index in range(place["source"], len(sources)):
        first = index == place["source"]
        for piece in reader.read(sources[index], *((place["offset"], place["record"]) if first else (0, 0))):
            batch.append(piece)
            size += len(piece.text)
            if piece.offset is not None and (size >= BATCH_BYTES or len(batch) >= BATCH_PIECES):
                yield batch, {"source": index, "offset": piece.offset, "record": piece.record}
                batch, size = [], 0
    yield batch, {"source": len(sources), "offset": 0, "record": 0}


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, each read while the one before is encoded."""
    with ThreadPoolExecutor(1) as reader:
        future = reader.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = reader.submit(next, batches, None)
            yield batch


class _Encoder:
    """Pieces to ids, with the separator after each document."""

    def __init__(self, tokenizer: Any, threads: int | None) -> None:
        self.tokenizer, self.threads = tokenizer, threads
        if tokenizer.eot_token is not None:
            self.separator = np.array([tokenizer.eot_token], np.uint32)
        else:
            self.separator = tokenizer.encode_numpy("\n")

    def __call__(self, batch: Sequence[Piece]) -> list[np.ndarray]:
        texts = [piece.text for piece in batch]
        if not texts:
            return []
        if hasattr(self.tokenizer, "encode_ordinary_batch_numpy"):
            ids, ends = self.tokenizer.encode_ordinary_batch_numpy(texts, num_threads=self.threads)
            return np.split(ids, ends[1:-1].astype(np.int64))
        return [self.tokenizer.encode_numpy(text) for text in texts]


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another process is preparing {folder}; wait for it, or stop it first") from error
    finally:
        os.close(handle)


def prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    out: Path,
    reader: Reader,
    *,
    shard_tokens: int = 100_000_000,
    threads: int | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Tokenize sources into the folder `out`, or go on with a preparation of the same sources that was stopped there.

    Args:
        sources: what `find_sources` gave.
        tokenizer: a Tokenizer or CharTokenizer.
        out: the folder; made where it is not there.
        reader: how sources are read and held out.
        shard_tokens: tokens in a shard; the last one of a split has fewer.
        threads: of the tokenizer; None takes all cores.
        progress: called with (bytes read, bytes in all, tokens written).
        say: receives lines for the user.

    Returns:
        What manifest.json holds.

    Raises:
        UserError: input that cannot be used, a folder that holds something else, a disk that is full or read-only. What was written
            until the last note stays, and the same call goes on from there.

    Example:
        >>> manifest = prepare(find_sources(["books"]), get_encoding("gpt2"), Path("tokens"), Reader())  # doctest: +SKIP
        >>> manifest["train"]["tokens"]  # doctest: +SKIP
        9034211
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; accepted is at least 1")
    dtype = token_dtype(tokenizer.n_vocab)
    made = not out.exists()
    with explain_writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with _held(out), explain_writing(out, "what is done stays; the same command goes on from there"):
            return _prepare(sources, tokenizer, out, reader, dtype, shard_tokens, threads, progress, say)
    except UserError:
        if made and not (out / PROGRESS).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _identity(
    sources: Sequence[Source], out: Path, reader: Reader, dtype: np.dtype, shard_tokens: int
) -> dict[str, Any]:
    """What must be the same for going on with a folder to make sense."""
    return {
        "sources": signature(sources),
        "tokenizer": file_sha256(out / "tokenizer.json"),
        "dtype": dtype.name,
        "shard_tokens": shard_tokens,
        "val_fraction": reader.val_fraction,
        "text_field": reader.text_field,
        "bad": reader.bad,
        "newlines": reader.newlines,
    }


def _prepare(
    sources: Sequence[Source],
    tokenizer: Any,
    out: Path,
    reader: Reader,
    dtype: np.dtype,
    shard_tokens: int,
    threads: int | None,
    progress: Callable[[int, int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    total = sum(source.n_bytes for source in sources)
    finished, notes = (out / MANIFEST).is_file(), (out / PROGRESS).is_file()
    if not finished and not notes:
        if others := [path.name for path in out.iterdir()]:
            raise UserError(f"{out} is not empty (it holds {others[0]}); give a new folder with --out")
        check_space(out, total * dtype.itemsize // 2, f"the shards {out}")
        tokenizer.save(out / "tokenizer.json")
    else:
        again = out / ".tokenizer.tmp"
        tokenizer.save(again)
        same = file_sha256(again) == file_sha256(out / "tokenizer.json")
        again.unlink()
        if not same:
            raise UserError(f"{out} was begun with another tokenizer; give a new folder with --out")
    reader.plan(sources)
    reader.splittable = getattr(tokenizer, "pattern_name", "char") is not None
    identity = _identity(sources, out, reader, dtype, shard_tokens)
    if finished:
        manifest = read_manifest(out)
        _same(manifest["identity"], identity, out)
        say(f"{out} is already prepared")
        return manifest
    state: dict[str, Any] = {}
    if notes:
        try:
            state = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{out / PROGRESS} is damaged; remove {out} and start again") from error
        _same(state["identity"], identity, out)
        reader.skipped, reader.first_skipped = state["skipped"], state["first_skipped"]
    place = state.get("place", {"source": 0, "offset": 0, "record": 0})
    splits = {name: _Split(out, name, dtype, shard_tokens, state.get(name, {})) for name in SPLITS}
    if notes:
        say(f"going on from {_done_bytes(sources, place) / max(total, 1):.0%} of the text")

    # A batch read ahead has counted what it left out: the count that belongs to a place is taken when the batch is made.
    def counted() -> Iterator[tuple[list[Piece], dict, tuple[int, str]]]:
        for batch, after in _batches(reader, sources, place):
            yield batch, after, (reader.skipped, reader.first_skipped)

    def note(after: dict[str, int], skipped: tuple[int, str]) -> None:
        for split in splits.values():
            split.flush()
        content = {"identity": identity, "place": after, "skipped": skipped[0], "first_skipped": skipped[1]}
        replace_text(out / PROGRESS, json.dumps(content | {name: split.state() for name, split in splits.items()}))

    encode, noted = _Encoder(tokenizer, threads), time.monotonic()
    note(place, (reader.skipped, reader.first_skipped))
    try:
        for batch, after, skipped in _ahead(counted()):
            try:
                encoded = encode(batch)
            except ValueError as error:
                raise UserError(
                    f"the tokenizer cannot encode the text before byte {after['offset']:,} of "
                    f"{sources[min(after['source'], len(sources) - 1)].path}: {error}"
                ) from error
            for piece, ids in zip(batch, encoded, strict=True):
                split = splits["val" if piece.val else "train"]
                split.write(ids)
                split.bytes += len(piece.text.encode())
                if piece.last:
                    split.write(encode.separator)
                    split.documents += 1
            if time.monotonic() - noted > JOURNAL_S:
                note(after, skipped)
                noted = time.monotonic()
            progress(_done_bytes(sources, after), total, sum(split.tokens for split in splits.values()))
    finally:
        for split in splits.values():
            if split.file is not None:
                split.file.close()
    return _finish(out, tokenizer, identity, splits, reader, sources)


def _finish(
    out: Path,
    tokenizer: Any,
    identity: dict[str, Any],
    splits: dict[str, _Split],
    reader: Reader,
    sources: Sequence[Source],
) -> dict[str, Any]:
    for split in splits.values():
        if split.open_tokens:
            split.file = open(split.path, "r+b")  # noqa: SIM115
            split.close()
    for name, what in (("train", "trains"), ("val", "is held out")):
        if not splits[name].tokens:
            (out / PROGRESS).unlink()
            shutil.rmtree(out)
            left = f" ({reader.skipped} left out; the first: {reader.first_skipped})" if reader.skipped else ""
            raise UserError(
                f"no text {what}: the sources hold too little, or --val-fraction {reader.val_fraction:g} is too near its ends{left}"
            )
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": 1,
        "source": f"{len(sources)} files, {sum(source.n_bytes for source in sources):,} bytes",
        "dtype": identity["dtype"],
        "vocab_size": tokenizer.n_vocab,
        "eot_token": tokenizer.eot_token,
        "tokenizer": {"file": "tokenizer.json", "sha256": identity["tokenizer"]},
        "skipped": reader.skipped,
        "identity": identity,
    }
    for name, split in splits.items():
        manifest[name] = {
            "tokens": split.tokens,
            "documents": split.documents,
            "bytes": split.bytes,
            "shards": split.shards,
        }
    replace_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    (out / PROGRESS).unlink()
    for path in out.glob("*.bin"):  # a shard begun after the last note of a run that was killed
        if path.name not in {shard["file"] for split in splits.values() for shard in split.shards}:
            path.unlink()
    return manifest


def _done_bytes(sources: Sequence[Source], place: dict[str, int]) -> int:
    """Bytes of the sources before a place; within a Parquet file, whose rows have no bytes, those before the file."""
    index = place["source"]
    inside = place["offset"] if index < len(sources) and sources[index].kind not in ("parquet", "arrow") else 0
    return sum(source.n_bytes for source in sources[:index]) + inside


def _same(stored: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    words = {"sources": "other sources, or sources that have changed since", "tokenizer": "another tokenizer"}
    for key, value in now.items():
        if stored.get(key) != value:
            what = words.get(key, f"{key.replace('_', '-')} {stored.get(key)!r}, not {value!r}")
            raise UserError(f"{out} was begun with {what}; give a new folder with --out, or remove that one")
