"""Token shards: a tokenized corpus of any size as a folder of files, memory-mapped and read as one array.

    manifest.json        format, dtype, vocab_size, eot_token; for each split tokens, documents, bytes and its shards with their SHA-256
    tokenizer.json       the tokenizer they were made with
    train-00000.bin ...  ids one after the other, little-endian uint16 or uint32, no header; the same for val
    progress.json        only while `fastgpt data prepare` is not finished: where it stands

`ShardedTokens` gives what the loader needs of an array (a length, slices, lookup by an array of positions), so a batch may straddle two
shards and nothing but the pages it touches is read.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.errors import UserError

FORMAT = "fastgpt-shards"
MANIFEST = "manifest.json"


class ShardedTokens:
    """Several memory-mapped files as one read-only array of ids.

    Args:
        parts: one-dimensional arrays of one dtype.

    Example:
        >>> tokens = ShardedTokens([np.arange(3, dtype=np.uint16), np.arange(3, 7, dtype=np.uint16)])
        >>> len(tokens), tokens[np.array([2, 3])], tokens[1:5]
        (7, array([2, 3], dtype=uint16), array([1, 2, 3, 4], dtype=uint16))
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.dtype = self.parts[0].dtype
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: Any) -> np.ndarray:
        """Ids by a slice of step 1 or by an integer array of any shape (positions from 0 to len - 1)."""
        if isinstance(key, slice):
            begin, end, step = key.indices(len(self))
            if step != 1:
                raise ValueError(f"key: a slice of step {step}; accepted is step 1")
            pieces = [
                part[max(begin - first, 0) : max(end - first, 0)]
                for part, first in zip(self.parts, self.starts[:-1].tolist(), strict=True)
                if begin < first + len(part) and end > first
            ]
            return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        positions = np.asarray(key)
        if positions.size and not (positions.min() >= 0 and positions.max() < len(self)):
            raise IndexError(f"key: positions {positions.min()} to {positions.max()}; accepted: 0 to {len(self) - 1}")
        shards = np.searchsorted(self.starts, positions, side="right") - 1
        out = np.empty(positions.shape, self.dtype)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self.parts[shard][positions[here] - self.starts[shard]]
        return out


Tokens = np.ndarray | ShardedTokens


def is_prepared(folder: str | Path) -> bool:
    """Whether a path is a folder that `fastgpt data prepare` made or began."""
    path = Path(folder)
    return (path / MANIFEST).is_file() or (path / "progress.json").is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json holds.

    Raises:
        UserError: it is missing, damaged, or of something else.
    """
    path = folder / MANIFEST
    if not path.is_file() and (folder / "progress.json").is_file():
        raise UserError(f"{folder} is not finished: run the same `fastgpt data prepare` again, it goes on where it was")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != 1:
        raise UserError(f'{path} does not describe token shards of fastgpt (no "format": "{FORMAT}", version 1)')
    return manifest


def open_shards(folder: Path) -> tuple[ShardedTokens, ShardedTokens, dict[str, Any]]:
    """Memory-map the shards of a prepared folder.

    Returns:
        (train, val, manifest).

    Raises:
        UserError: a shard is missing or has another size than the manifest says.
    """
    manifest = read_manifest(folder)
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    splits = []
    for split in ("train", "val"):
        parts = []
        for shard in manifest[split]["shards"]:
            path = folder / shard["file"]
            expected = shard["tokens"] * dtype.itemsize
            size = path.stat().st_size if path.exists() else 0
            if size != expected or size == 0:
                raise UserError(f"the shard {path} is damaged: it has {size:,} bytes, {MANIFEST} says {expected:,}")
            parts.append(np.memmap(path, dtype=dtype, mode="r"))
        if not parts:
            raise UserError(f"{folder} has no shards of the split {split!r}")
        splits.append(ShardedTokens(parts))
    return splits[0], splits[1], manifest


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(folder: Path, say: Callable[[str], None] = lambda message: None) -> int:
    """Read every shard and the tokenizer and compare their SHA-256 with the manifest's.

    Args:
        folder: a prepared folder.
        say: receives a line for each damaged file.

    Returns:
        The number of bytes that are right.

    Raises:
        UserError: at least one file is not what was written; the message names the first.
    """
    manifest = read_manifest(folder)
    wanted = {manifest["tokenizer"]["file"]: manifest["tokenizer"]["sha256"]}
    wanted |= {shard["file"]: shard["sha256"] for split in ("train", "val") for shard in manifest[split]["shards"]}
    damaged, good = [], 0
    for name, sha256 in wanted.items():
        path = folder / name
        if not path.is_file():
            damaged.append(f"{path} is missing")
        elif file_sha256(path) != sha256:
            damaged.append(f"the content of {path} has changed (its SHA-256 is another)")
        else:
            good += path.stat().st_size
            continue
        say(damaged[-1])
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"damaged shards: {damaged[0]}{more}; remove {folder} and prepare it again")
    return good
