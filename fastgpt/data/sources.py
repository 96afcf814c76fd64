"""Which files paths stand for, and what kind of text each holds; fastgpt.data.reader reads them.

    *.jsonl, *.ndjson   one JSON object a line; the text is one of its fields
    *.parquet           one row a document; the text is one of its columns (needs pyarrow)
    *.arrow             the same, as Hugging Face's datasets keeps it
    hf:NAME             a data set of the Hugging Face hub, or a local folder that `datasets.load_dataset` takes (needs datasets):
                        hf:OWNER/NAME:CONFIG@SPLIT, with the split train where none is named
    anything else       a text file, one document

A folder stands for every file below it in the order of their paths, hidden ones left out; one that `Dataset.save_to_disk` wrote, for
its .arrow files.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.errors import UserError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")  # what save_to_disk writes beside the text
HUB = "hf:"
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


@dataclass(frozen=True)
class Source:
    """One file: its path, its name below the folder that was given, its kind and its size in bytes."""

    path: Path
    name: str
    kind: str
    n_bytes: int
    named: bool


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files that paths of files and folders stand for.

    Args:
        paths: files and folders, in this order.

    Raises:
        UserError: a path does not exist, a folder holds no files, or a file is compressed.

    Example:
        >>> [source.kind for source in find_sources(["more.jsonl", "books"])]  # doctest: +SKIP
        ['jsonl', 'text', 'text']
    """
    found = []
    for asked in paths:
        given = Path(asked)
        if str(asked).startswith(HUB):
            found += _hub(str(asked).removeprefix(HUB))
        elif given.is_dir():
            below = []
            for folder, folders, names in os.walk(given):
                folders[:] = [name for name in folders if not name.startswith(".")]
                below += [Path(folder) / name for name in names if not name.startswith(".")]
            files = sorted(path for path in below if path.is_file())
            if any(path.name in DATASET_FILES for path in files) and any(path.suffix == ".arrow" for path in files):
                files = [path for path in files if path.suffix == ".arrow"]
            if not files:
                raise UserError(f"the folder {given} holds no files")
            found += [_source(path, path.relative_to(given).as_posix(), False) for path in files]
        elif given.exists():
            found.append(_source(given, given.name, True))
        else:
            raise UserError(f"{given} does not exist; accepted are files and folders of text, JSONL and Parquet")
    if not found:
        raise UserError("no sources given; accepted are files and folders of text, JSONL and Parquet")
    return found


def _hub(asked: str) -> list[Source]:
    """The Arrow files of a data set that `datasets` downloads, or finds in its cache."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{HUB}{asked} needs datasets: pip install 'fastgpt-kernels[datasets]'") from error
    name, _, split = asked.partition("@")
    name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{HUB}{asked} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}; "
            f"accepted is {HUB}OWNER/NAME, with :CONFIG and @SPLIT where there are several"
        ) from error
    files = [Path(item["filename"]) for item in found.cache_files]
    if not files:
        raise UserError(f"{HUB}{asked} has no files on the disk")
    return [Source(path, f"{asked}/{path.name}", "arrow", path.stat().st_size, True) for path in files]


def _source(path: Path, name: str, named: bool) -> Source:
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        raise UserError(f"{path} is compressed; unpack it first (Parquet is read as it is)")
    return Source(path, name, KINDS.get(suffix, "text"), path.stat().st_size, named)


def signature(sources: Sequence[Source]) -> str:
    """A hash of the sources' names, sizes and times of change: the same text as before, as far as can be told without reading it."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0{source.n_bytes}\0{source.path.stat().st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()
