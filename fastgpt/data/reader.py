"""Documents of sources (fastgpt.data.sources) as a stream that can be taken up again at any place.

Text comes in pieces of about PIECE_BYTES that end where every built-in pre-tokenizer has a boundary, so a file of any size is read in
bounded memory and encodes as it would whole.

Held-out text is decided without randomness. Of HOLD_OUT_FILES or more text files, whole files are held out by a hash of their path; of
fewer, the end of each. Records are held out by a hash of their text, so that copies of a record are never on both sides.

What cannot be read is treated as `bad` says: "stop" raises an error that names the file and the line, "skip" leaves the file or the
record out and counts it, "replace" puts U+FFFD where bytes are not UTF-8 (and skips records that are wrong otherwise).
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt._bpe import safe_cut
from fastgpt.data.corpora import HOLD_OUT_FILES, held_out
from fastgpt.data.sources import Source
from fastgpt.errors import UserError

PIECE_BYTES = 2**20
PARQUET_ROWS = 1024
BAD = ("stop", "skip", "replace")
NEWLINES = ("unix", "keep")


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: characters.
        val: held out.
        last: the document ends with it.
        offset: where to go on after it (bytes of a file, rows of a Parquet file); None inside a record.
        record: lines or rows read so far.
    """

    text: str
    val: bool
    last: bool
    offset: int | None
    record: int


@dataclass
class Reader:
    """Reads sources.

    Args:
        val_fraction: share held out, above 0 and below 1.
        text_field: the field or column with the text.
        bad: "stop", "skip" or "replace".
        newlines: "unix" turns CR LF into LF, "keep" leaves line ends as they are.
        splittable: whether text may be cut at the boundaries of the built-in pre-tokenizers; False gives whole documents.
        skipped: counts what was left out; `first_skipped` says what the first was.

    Raises:
        ValueError: `bad` or `newlines` is something else.
    """

    val_fraction: float = 0.01
    text_field: str = "text"
    bad: str = "stop"
    newlines: str = "unix"
    splittable: bool = True
    skipped: int = 0
    first_skipped: str = ""
    _whole_files: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bad not in BAD:
            raise ValueError(f"bad is {self.bad!r}; accepted is one of {', '.join(BAD)}")
        if self.newlines not in NEWLINES:
            raise ValueError(f"newlines is {self.newlines!r}; accepted is one of {', '.join(NEWLINES)}")

    def plan(self, sources: Sequence[Source]) -> None:
        """Decide which text files are held out whole; call it once, with all sources."""
        names = [source.name for source in sources if source.kind == "text"]
        self._whole_files = {}
        if len(names) >= HOLD_OUT_FILES:
            chosen = {name: held_out(name, self.val_fraction) for name in names}
            if any(chosen.values()) and not all(chosen.values()):
                self._whole_files = chosen

    def read(self, source: Source, offset: int = 0, record: int = 0) -> Iterator[Piece]:
        """The pieces of one source from a place that an earlier Piece named.

        Raises:
            UserError: what is wrong, with the file and the line, byte or row.
        """
        try:
            readers = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet, "arrow": self._arrow}
            yield from readers[source.kind](source, offset, record)
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror or error}") from error

    def _wrong(self, message: str, *, stop: bool = False) -> None:
        if self.bad == "stop" or stop:
            raise UserError(f"{message}; --bad skip leaves such input out")
        self.skipped += 1
        self.first_skipped = self.first_skipped or message

    def _clean(self, text: str) -> str:
        return text.replace("\r\n", "\n") if self.newlines == "unix" else text

    # Text files

    def _text(self, source: Source, offset: int, record: int) -> Iterator[Piece]:
        if offset == 0 and (reason := self._unreadable(source.path)):
            self._wrong(reason)
            return
        size = source.n_bytes
        if source.name in self._whole_files:
            parts = [(0, size, self._whole_files[source.name])]
        else:
            cut = self._val_start(source)
            parts = [(0, cut, False), (cut, size, True)]
        with open(source.path, "rb") as file:
            for begin, end, val in parts:
                begin = max(begin, offset)
                if begin < end:
                    yield from self._range(file, begin, end, val)

    def _unreadable(self, path: Path) -> str:
        """Why a file is not UTF-8 text, or an empty string."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        at = 0
        with open(path, "rb") as file:
            while block := file.read(2**22):
                if at == 0 and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    return f"{path} is UTF-16 text; convert it to UTF-8 first"
                if (zero := block.find(b"\0")) >= 0:
                    return f"{path} is binary (a zero byte at offset {at + zero:,}); accepted is UTF-8 text"
                if self.bad != "replace":
                    pending = len(decoder.getstate()[0])
                    try:
                        decoder.decode(block)
                    except UnicodeDecodeError as error:
                        return _not_utf8(path, at - pending + error.start, error.object[error.start])
                at += len(block)
        if self.bad != "replace" and decoder.getstate()[0]:
            return f"{path} ends within a character; it was cut short"
        return "" if at else f"{path} is empty"

    def _val_start(self, source: Source) -> int:
        """The byte where the held-out end of a file begins: after a line end where one is near, else between characters."""
        target = int(source.n_bytes * (1.0 - self.val_fraction))
        with open(source.path, "rb") as file:
            file.seek(target)
            near = file.read(PIECE_BYTES)
        line_end = near.find(b"\n")
        if 0 <= line_end < len(near) - 1:
            return target + line_end + 1
        return target + next((i for i, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0)

    def _range(self, file: Any, begin: int, end: int, val: bool) -> Iterator[Piece]:
        file.seek(begin)
        buffer, place = b"", begin
        while place < end:
            want = max(PIECE_BYTES, len(buffer))  # without a place to cut, ever more
            block = file.read(min(want, end - place - len(buffer)))
            buffer += block
            last = place + len(buffer) >= end
            if not last and not block:
                raise UserError(f"{file.name} became shorter while it was read")
            if not self.splittable and not last:
                continue
            cut = len(buffer) if last else self._cut(buffer)
            if cut:
                skip = 3 if place == 0 and buffer.startswith(codecs.BOM_UTF8) else 0
                text = buffer[skip:cut].decode("utf-8", "replace" if self.bad == "replace" else "strict")
                buffer, place = buffer[cut:], place + cut
                yield Piece(self._clean(text), val, last, place, 0)

    @staticmethod
    def _cut(data: bytes) -> int:
        """Where a piece may end: at a boundary of every pre-tokenizer that does not part CR from LF."""
        cut = safe_cut(data, len(data))
        while cut and data[cut - 1 : cut] == b"\r":
            cut = safe_cut(data, cut - 1)
        return cut

    # Records

    def _record(self, text: str, offset: int, record: int) -> Iterator[Piece]:
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = self._clean(text)
        val = held_out(text, self.val_fraction)
        if len(text) <= PIECE_BYTES or not self.splittable:
            yield Piece(text, val, True, offset, record)
            return
        data, begin, size = text.encode(), 0, PIECE_BYTES
        while begin < len(data):
            end = begin + size
            cut = len(data) - begin if end >= len(data) else self._cut(data[begin:end])
            if not cut:
                size *= 2
                continue
            last = begin + cut >= len(data)
            yield Piece(data[begin : begin + cut].decode(), val, last, offset if last else None, record)
            begin, size = begin + cut, PIECE_BYTES

    def _jsonl(self, source: Source, offset: int, record: int) -> Iterator[Piece]:
        with open(source.path, "rb") as file:
            file.seek(offset)
            while line := file.readline():
                offset, record = offset + len(line), record + 1
                if record == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                text, wrong = self._field(line)
                if wrong:
                    self._wrong(f"{source.path}, line {record:,}: {wrong}")
                elif text.strip():
                    yield from self._record(text, offset, record)

    def _field(self, line: bytes) -> tuple[str, str]:
        """(text, "") of a line of JSONL, or ("", what is wrong with it)."""
        try:
            value = json.loads(line.rstrip().decode("utf-8", "replace" if self.bad == "replace" else "strict"))
        except UnicodeDecodeError as error:
            return "", f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1:,})"
        except json.JSONDecodeError as error:
            return "", f"not JSON ({error.msg} at column {error.colno:,})"
        except (ValueError, RecursionError) as error:
            return "", f"not JSON ({str(error)[:80]})"
        if not isinstance(value, dict):
            return "", f"holds {type(value).__name__}; accepted is an object with a field {self.text_field!r}"
        text = value.get(self.text_field)
        if self.text_field not in value:
            return (
                "",
                f"no field {self.text_field!r}; it has {', '.join(map(repr, list(value)[:8])) or 'none'} (--text-field)",
            )
        if not isinstance(text, str):
            return "", f"the field {self.text_field!r} holds {type(text).__name__}; accepted is text"
        return text, ""

    def _parquet(self, source: Source, offset: int, record: int) -> Iterator[Piece]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"{source.path} is Parquet, which needs pyarrow: pip install 'fastgpt-kernels[parquet]'"
            ) from error
        try:
            with pyarrow.parquet.ParquetFile(source.path) as file:
                names = file.schema_arrow.names
                if self.text_field not in names:
                    raise UserError(
                        f"{source.path} has no column {self.text_field!r}; it has {', '.join(names)} (--text-field)"
                    )
                row = 0
                for group in range(file.num_row_groups):
                    n_rows = file.metadata.row_group(group).num_rows
                    if row + n_rows <= offset:  # read before the stop: not even opened
                        row += n_rows
                        continue
                    for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[self.text_field]):
                        yield from self._rows(source, batch.column(0).to_pylist(), row, offset)
                        row += batch.num_rows
        except pyarrow.ArrowException as error:
            self._wrong(f"{source.path} is not a readable Parquet file ({str(error).splitlines()[0][:100]})")

    def _arrow(self, source: Source, offset: int, record: int) -> Iterator[Piece]:
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(
                f"{source.path} is Arrow, which needs pyarrow: pip install 'fastgpt-kernels[parquet]'"
            ) from error
        try:
            with pyarrow.memory_map(str(source.path)) as file, pyarrow.ipc.open_stream(file) as batches:
                names = batches.schema.names
                if self.text_field not in names:
                    raise UserError(
                        f"{source.path} has no column {self.text_field!r}; it has {', '.join(names)} (--text-field)"
                    )
                row = 0
                for batch in batches:
                    if row + batch.num_rows > offset:
                        yield from self._rows(source, batch.column(self.text_field).to_pylist(), row, offset)
                    row += batch.num_rows
        except pyarrow.ArrowException as error:
            self._wrong(f"{source.path} is not a readable Arrow file ({str(error).splitlines()[0][:100]})")

    def _rows(self, source: Source, texts: Sequence[Any], before: int, offset: int) -> Iterator[Piece]:
        """The records of a batch's texts, `before` rows after the file's beginning; the first `offset` rows of the file left out."""
        for row, text in enumerate(texts, start=before + 1):
            if row <= offset:
                continue
            if not isinstance(text, str):
                self._wrong(f"{source.path}, row {row:,}: the column {self.text_field!r} holds {type(text).__name__}")
            elif text.strip():
                yield from self._record(text, row, row)


def _not_utf8(path: Path, offset: int, byte: int) -> str:
    with open(path, "rb") as file:
        line, left = 1, offset
        while left and (block := file.read(min(2**22, left))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{path}, line {line:,}: not UTF-8 (byte 0x{byte:02x} at offset {offset:,})"
