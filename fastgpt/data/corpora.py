"""Where text comes from: `stdlib`, `shakespeare`, or a file or folder of the user.

    stdlib       the .py files of the running Python's standard library, without tests, generated tables and bundled programs: about
                 8 MB of code and documentation that every machine with Python has. The text differs a little between Python versions.
    shakespeare  tiny shakespeare (karpathy/char-rnn; the plays are in the public domain), downloaded once into a cache folder and
                 kept only if its SHA-256 is the known one.
    PATH         one UTF-8 text file, or a folder: every UTF-8 file below it, hidden ones left out.

Held-out text. A single text is cut once: the first part trains, the last `val_fraction` of the characters validates. Many files
(HOLD_OUT_FILES or more) are held out whole, chosen by a hash of the file's path, so that no file is seen in both parts and adding a
file moves no other one. A corpus is read into memory as a whole.
"""

import hashlib
import os
import sysconfig
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastgpt.errors import UserError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
DOWNLOAD_TIMEOUT_S = 10.0
HOLD_OUT_FILES = 20

# Tests, bundled programs, modules that not every version has, and generated tables (which are easy to predict and teach little).
STDLIB_LEFT_OUT = frozenset(
    (
        *("test", "tests", "idle_test", "__pycache__"),
        *("idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip", "site-packages", "dist-packages"),
        *("encodings", "pydoc_data"),
    )
)


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        name: short name, used for the run folder.
        description: one line for the user.
        train: documents that train.
        val: documents held out.
        notes: things the user should know, such as files that were left out.
    """

    name: str
    description: str
    train: list[str]
    val: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Size of all text in bytes of UTF-8."""
        return sum(len(text.encode()) for text in (*self.train, *self.val))


def load_corpus(source: str, val_fraction: float) -> Corpus:
    """Read the text that `source` names and split it.

    Args:
        source: "stdlib", "shakespeare", or the path of a file or folder.
        val_fraction: share held out, above 0 and below 1.

    Raises:
        UserError: the source is missing, unreadable, empty or not text, or there is no network for a first download.

    Example:
        >>> corpus = load_corpus("stdlib", 0.1)
        >>> len(corpus.train) > len(corpus.val) > 0
        True
    """
    if source == "stdlib":
        return _stdlib(val_fraction)
    if source == "shakespeare":
        text = read_text(shakespeare_file())
        return _split_text("shakespeare", f"tiny shakespeare, {len(text):,} characters", text, val_fraction)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, val_fraction)
    if not path.exists():
        raise UserError(
            f"data.source {source!r} does not exist; accepted is 'stdlib', 'shakespeare', a file or a folder"
        )
    text = read_text(path)
    return _split_text(_short_name(path), f"{path}, {len(text):,} characters", text, val_fraction)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as they stand, without a byte-order mark.

    Raises:
        UserError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not data.strip():
        raise UserError(f"{path} is empty; accepted is a file of UTF-8 text")
    zero = data.find(b"\0")
    if zero >= 0:
        raise UserError(f"{path} is binary (a zero byte at offset {zero:,}); accepted is a file of UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start:,}); convert it to UTF-8 first"
        ) from error


def held_out(relative: str, val_fraction: float) -> bool:
    """Whether a file of a collection validates: decided by a hash of its path alone, so the same everywhere."""
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def _split_text(name: str, description: str, text: str, val_fraction: float, notes: list[str] | None = None) -> Corpus:
    cut = int(len(text) * (1.0 - val_fraction) + 1e-9)
    if not 0 < cut < len(text):
        raise UserError(f"{description}: too short to hold {val_fraction:.0%} of it out for validation")
    return Corpus(name, description, [text[:cut]], [text[cut:]], notes or [])


def _split_files(
    name: str, description: str, files: list[tuple[str, str]], val_fraction: float, notes: list[str]
) -> Corpus:
    """Whole files held out where there are enough of them, one cut through all text otherwise.

    Of identical files the first is taken: a copy in the other part would be validation text that was trained on.
    """
    first_of = {text: path for path, text in reversed(files)}
    distinct = [(path, text) for path, text in files if first_of[text] == path]
    if len(distinct) < len(files):
        notes = [*notes, f"{len(files) - len(distinct)} files left out as copies of others"]
    files = distinct
    train = [text for path, text in files if not held_out(path, val_fraction)]
    val = [text for path, text in files if held_out(path, val_fraction)]
    if len(files) < HOLD_OUT_FILES or not train or not val:
        return _split_text(name, description, "\n".join(text for _, text in files), val_fraction, notes)
    return Corpus(name, description, train, val, notes)


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(item for item in folders if item not in STDLIB_LEFT_OUT and not item.startswith("config-"))
        for name in sorted(names):
            # _sysconfigdata is written when Python is built: it holds the paths of one machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder) / name


def _stdlib(val_fraction: float) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in _stdlib_files(root):
        try:
            files.append((path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue  # an unreadable or oddly encoded module; the rest is plenty
    files = sorted((name, text) for name, text in files if text.strip())
    size = sum(len(text) for _, text in files)
    if size < 1_000_000:
        raise UserError(
            f"the standard library at {root} holds only {size:,} characters of source; give a text with --data FILE"
        )
    version = sysconfig.get_python_version()
    description = f"the standard library of Python {version}, {len(files)} files, {size:,} characters"
    return replace(_split_files("stdlib", description, files, val_fraction, []), notes=[])


def _folder(root: Path, val_fraction: float) -> Corpus:
    files, left_out = [], []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(item for item in folders if not item.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith(".") or not path.is_file():
                continue
            try:
                files.append((path.relative_to(root).as_posix(), read_text(path)))
            except UserError as error:
                left_out.append(str(error))
    files.sort()
    if not files:
        why = f" ({len(left_out)} files left out; the first: {left_out[0]})" if left_out else ""
        raise UserError(f"the folder {root} holds no UTF-8 text{why}")
    notes = (
        [f"{len(left_out)} of {len(files) + len(left_out)} files left out; the first: {left_out[0]}"]
        if left_out
        else []
    )
    size = sum(len(text) for _, text in files)
    return _split_files(
        _short_name(root), f"{root}, {len(files)} files, {size:,} characters", files, val_fraction, notes
    )


def _short_name(path: Path) -> str:
    """The stem of a path in characters that suit a folder's name."""
    stem = path.resolve().stem
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "text"


def cache_folder() -> Path:
    """Where downloads are kept: FASTGPT_CACHE, or fastgpt below XDG_CACHE_HOME (~/.cache)."""
    if own := os.environ.get("FASTGPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"


def shakespeare_file(url: str = SHAKESPEARE_URL) -> Path:
    """The path of tiny shakespeare, downloaded first where it is not in the cache.

    Raises:
        UserError: no network and no cached copy, or what was downloaded or cached is not the known text.
    """
    path = cache_folder() / "tinyshakespeare.txt"
    way_out = f"download {url} elsewhere, put it at {path}, or give any text with --data FILE"
    if path.exists():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"{path} is not tiny shakespeare (its SHA-256 is another); remove it and try again")
        return path
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = response.read(SHAKESPEARE_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download tiny shakespeare ({reason}); without a network, {way_out}") from error
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"what {url} gave is not tiny shakespeare (its SHA-256 is another); nothing was kept; {way_out}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(
            f"cannot keep tiny shakespeare at {path}: {error.strerror}; set FASTGPT_CACHE to another folder"
        ) from error
    return path
