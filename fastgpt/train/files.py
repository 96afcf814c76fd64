"""Writing files so that a kill at any moment leaves either the old or the new content, and errors that say what to do.

A file is written beside its place under a temporary name, flushed to the disk, and renamed over the old one; POSIX makes the rename
atomic. The folder is flushed after it, so the rename itself survives a power cut.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgpt.errors import UserError

# EFBIG is the limit of `ulimit -f`, EDQUOT a user's quota: for the user the same as a full disk.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it to `path`; on an error `path` is untouched."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what kills in the middle of a write have left in a folder: hidden files that end in `.tmp`, and safetensors' `.tmpXXXXXX`.

    For a process that holds the folder (`fastgpt.train.run.locked`): weights of a run are written under a new name each time, so that
    without this every kill could leave a file of their size.
    """
    ours, theirs = folder.glob(".*.tmp"), folder.glob(".tmp" + "[0-9A-Za-z]" * 6)
    for path in (*ours, *theirs):
        with suppress(OSError):  # a folder, or one that cannot be written: what writes next says so
            path.unlink()


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with text."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def os_error_number(error: BaseException) -> int | None:
    """The errno of an OSError, also where safetensors has turned it into its own exception with `code: N` in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"Os \{ code: (\d+)", str(error)) or re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


@contextmanager
def explain_writing(what: Path, advice: str = "") -> Iterator[None]:
    """Turn a failed write below `what` into one clear line.

    Args:
        what: the file or folder being written.
        advice: added to the message, such as how to go on.
    """
    try:
        yield
    except Exception as error:
        # A UserError of the model's own writer carries the system's error as its cause.
        number = os_error_number(error.__cause__ if isinstance(error, UserError) and error.__cause__ else error)
        if number is None:
            raise
        reason = "no disk space left" if number in NO_SPACE else os.strerror(number)
        raise UserError(f"cannot write {what}: {reason}{'; ' + advice if advice else ''}") from error


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError unless the disk of `folder` (or of its nearest existing parent) has `needed_bytes` free."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UserError(
            f"no disk space for {what}: about {needed_bytes / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free on the disk of {place}"
        )
