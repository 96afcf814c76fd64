"""Token files: a run's text as ids on disk, memory-mapped when read.

    train.bin, val.bin   ids one after the other, little-endian uint16 (vocabularies up to 65,536) or uint32; no header
    meta.json            what they are: format, dtype, vocab_size, and for each split its tokens, documents, bytes and SHA-256

Documents are separated by the tokenizer's end-of-text token where it has one, by a newline where it has none (a character tokenizer).
Text is encoded in pieces of at most CHUNK characters, cut after a line end, so the ids of a huge corpus never stand in memory as
Python objects; a cut can split a run of blank lines into other tokens than one encoding of the whole text would, and decodes to the
same text. Bytes are counted so that a loss in nats per token can be reported as bits per byte, which compares across tokenizers.

A run on a prepared folder (fastgpt.data.prepare) has no token files of its own: its meta.json names that folder.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data.shards import MANIFEST, Tokens, file_sha256, open_shards
from fastgpt.errors import UserError

FORMAT = "fastgpt-tokens"
LINK_FORMAT = "fastgpt-shards-link"
CHUNK = 16 * 2**20


@dataclass(frozen=True)
class TokenFiles:
    """Both splits of a tokenized corpus.

    Attributes:
        train: (n,) uint16 or uint32, memory-mapped, read-only: one file, or the shards of a prepared folder as one array.
        val: the same for the held-out text.
        meta: what meta.json holds.
    """

    train: Tokens
    val: Tokens
    meta: dict[str, Any]

    def bytes_per_token(self, split: str) -> float:
        """Mean length of a token in bytes of text."""
        return self.meta[split]["bytes"] / self.meta[split]["tokens"]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def pieces(text: str, size: int = CHUNK) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, after a line end where one is in the last half of the piece."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            line_end = text.rfind("\n", start + size // 2, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end


def _encode(tokenizer: Any, documents: list[str]) -> Iterator[np.ndarray]:
    """The ids of documents, piece by piece, with a separator after each document but the last of a tokenizer without one."""
    if tokenizer.eot_token is not None:
        separator = np.array([tokenizer.eot_token])
    else:
        separator = tokenizer.encode_numpy("\n") if len(documents) > 1 else np.array([], dtype=np.uint32)
    for document in documents:
        for piece in pieces(document):
            yield tokenizer.encode_numpy(piece)
        yield separator


def write_tokens(folder: Path, tokenizer: Any, splits: dict[str, list[str]], *, source: str) -> dict[str, Any]:
    """Encode both splits into `folder`, which exists, and return what meta.json holds.

    Args:
        folder: where train.bin, val.bin and meta.json go.
        tokenizer: a fastgpt tokenizer.
        splits: {"train": documents, "val": documents}.
        source: what the text is, for meta.json.

    Raises:
        OSError: the files cannot be written.
        ValueError: the tokenizer cannot encode a character (character level only).
    """
    dtype = token_dtype(tokenizer.n_vocab)
    meta: dict[str, Any] = {"format": FORMAT, "version": 1, "source": source, "dtype": dtype.name}
    meta |= {"vocab_size": tokenizer.n_vocab, "eot_token": tokenizer.eot_token}
    for split, documents in splits.items():
        digest, n_tokens = hashlib.sha256(), 0
        with open(folder / f"{split}.bin", "wb") as file:
            for ids in _encode(tokenizer, documents):
                data = np.ascontiguousarray(ids, dtype=dtype).data
                file.write(data)
                digest.update(data)
                n_tokens += len(ids)
        n_bytes = sum(len(document.encode()) for document in documents)
        meta[split] = {"tokens": n_tokens, "documents": len(documents), "bytes": n_bytes, "sha256": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def open_tokens(folder: Path) -> TokenFiles:
    """Memory-map the token files of a folder.

    Raises:
        UserError: a file is missing, cut short, or not what meta.json says.
    """
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON") from error
    if isinstance(meta, dict) and meta.get("format") == LINK_FORMAT:
        return _open_link(path, meta)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("dtype") not in ("uint16", "uint32"):
        raise UserError(f'{path} does not describe token files of fastgpt (no "format": "{FORMAT}")')
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    arrays = {}
    for split in ("train", "val"):
        file = folder / f"{split}.bin"
        expected = meta[split]["tokens"] * dtype.itemsize
        size = file.stat().st_size if file.exists() else 0
        if size != expected or size == 0:
            raise UserError(f"{file} is damaged: it has {size:,} bytes, {path.name} says {expected:,}")
        arrays[split] = np.memmap(file, dtype=dtype, mode="r")
    return TokenFiles(arrays["train"], arrays["val"], meta)


def link_shards(folder: Path, shards: Path) -> None:
    """Have the token files of `folder` be the shards of a prepared folder, by its path and the checksum of its manifest."""
    link = {"format": LINK_FORMAT, "path": str(shards.resolve()), "manifest_sha256": file_sha256(shards / MANIFEST)}
    (folder / "meta.json").write_text(json.dumps(link, indent=2) + "\n", encoding="utf-8")


def _open_link(path: Path, link: dict[str, Any]) -> TokenFiles:
    shards = Path(link["path"])
    if not (shards / MANIFEST).is_file():
        raise UserError(f"the prepared folder {shards} is gone; put it back, or change its path in {path}")
    if file_sha256(shards / MANIFEST) != link["manifest_sha256"]:
        raise UserError(f"the prepared folder {shards} is not the one this run began with (its manifest has changed)")
    return TokenFiles(*open_shards(shards))
