"""Reading data for fine-tuning: labelled texts, plain texts and conversations, with the line of every record.

Labelled texts come as TSV, CSV or JSON Lines; conversations as a JSON array or JSON Lines in one of three layouts, told apart by their
keys:

    Alpaca    {"instruction": ..., "input": ..., "output": ...}            (input may be missing or empty)
    ShareGPT  {"conversations": [{"from": "human", "value": ...}, ...]}
    OpenAI    {"messages": [{"role": "user", "content": ...}, ...]}

Files are UTF-8 (a byte-order mark is dropped; UTF-16 is recognised by its mark), line ends may be those of Windows. A TSV line is a
record: fields are cut at tabs, and one that is quoted as spreadsheets do it (its own quotes doubled) is unquoted. A CSV field may
hold line ends. Everything that cannot be used is an error that names the file, the line and what is accepted.
"""

import codecs
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.train.config import nearest

TEXT_NAMES = ("text", "sentence", "message", "content", "sms", "review", "excerpt")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "score", "rating")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Labelled:
    """One text and what it is to be recognised as.

    Attributes:
        text: the text.
        label: the label's text; a number's for regression.
        line: the line of the file it starts on, from 1.
    """

    text: str
    label: str
    line: int


@dataclass(frozen=True)
class Message:
    """One turn: the role ("system", "user" or "assistant") and what was said."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """The turns of one conversation and the line it starts on, from 1."""

    messages: tuple[Message, ...]
    line: int


def read_text(path: Path, encoding: str | None = None) -> str:
    """A file's text with line ends made "\\n".

    Args:
        path: the file.
        encoding: Python's name of its encoding; None: UTF-8, or what a byte-order mark says.

    Raises:
        UserError: it cannot be read, the encoding is unknown, or bytes do not belong to it; the message names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    used = encoding or ("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    try:
        text = raw.decode(used)
    except LookupError as error:
        raise UserError(f"--encoding is {encoding!r}; accepted is an encoding that Python knows, as latin-1") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        name = used.removesuffix("-sig")
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02X} is not {name}; save the whole file as UTF-8, "
            "or name its encoding with --encoding"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unquote(field: str) -> str:
    """A field without the quotes that a spreadsheet put around it; any other as it is."""
    if len(field) >= 2 and field[0] == field[-1] == '"':
        inner = field[1:-1]
        if '"' not in inner.replace('""', ""):
            return inner.replace('""', '"')
    return field


def _tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, [_unquote(field) for field in line.split("\t")]


def _csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV: {error}") from error


def _json_records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of every record of a JSON array or of JSON Lines."""
    if not text.lstrip().startswith("["):
        for number, record in enumerate(text.split("\n"), start=1):
            if record.strip():
                try:
                    value = json.loads(record.rstrip())
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not JSON: {error.msg} at column {error.colno:,}"
                    ) from error
                except RecursionError as error:
                    raise UserError(f"{path}, line {number}: nested too deeply") from error
                yield number, value
        return
    decoder = json.JSONDecoder()
    place, line, seen, comma = text.index("[") + 1, 1, 0, False
    while True:
        while place < len(text) and text[place].isspace():
            place += 1
        line += text.count("\n", seen, place)
        seen = place
        if place == len(text):
            raise UserError(f"{path}, line {line}: the JSON array has no end; the file is cut short")
        if text[place] == "]":
            return
        if comma:
            if text[place] != ",":
                raise UserError(f"{path}, line {line}: not JSON: a comma is missing between two records")
            place, comma = place + 1, False
            continue
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise UserError(f"{path}, line {line}: nested too deeply") from error
        yield line, value
        comma = True


def _rows(path: Path, encoding: str | None) -> tuple[list[str] | None, list[tuple[int, list[str]]]]:
    """(names of the columns or None, [(line, fields)]) of a table."""
    text = read_text(path, encoding)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json", ".ndjson"):
        records = list(_json_records(path, text))
        names: list[str] = []
        for line, record in records:
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {line}: holds {type(record).__name__}; accepted is an object with keys")
            names += [name for name in record if name not in names]
        return names, [(line, [_plain(record.get(name)) for name in names]) for line, record in records]
    if kind == ".txt":
        return ["text"], [(number, [line]) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = list(_csv(path, text) if kind == ".csv" else _tsv(text))
    header = [field.strip() for field in rows[0][1]] if rows else []
    if any(field.lower() in TEXT_NAMES for field in header):
        return header, rows[1:]
    return None, rows


def _plain(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _column(path: Path, given: str | None, option: str, names: Sequence[str] | None, width: int) -> int | None:
    """The place of a column that the user named or numbered (from 1); None where nothing was given."""
    if given is None:
        return None
    if names is not None and given in names:
        return list(names).index(given)
    if given.isdecimal() and 1 <= int(given) <= width:
        return int(given) - 1
    have = ", ".join(names) if names is not None else "none are named"
    raise UserError(
        f"{option} is {given!r}{nearest(given, names or ())}; accepted is a column of {path} ({have}) or its number, 1 to {width}"
    )


def _find(names: Sequence[str] | None, wanted: Sequence[str]) -> int | None:
    lower = [name.lower() for name in names or ()]
    return next((lower.index(name) for name in wanted if name in lower), None)


def _number_column(rows: Sequence[tuple[int, Sequence[str]]], width: int) -> int | None:
    """The first column whose every value is a number, with not all of them whole (those are ids and counts)."""
    for place in range(width):
        values = [_number(fields[place]) if place < len(fields) else None for _, fields in rows]
        numbers = [value for value in values if value is not None]
        if len(numbers) == len(rows) and any(not value.is_integer() for value in numbers):
            return place
    return None


def read_labelled(
    path: Path,
    *,
    numbers: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str | None = None,
) -> list[Labelled]:
    """Labelled texts of a TSV, CSV or JSON Lines file.

    The first line names the columns where one of its fields is "text" or another of TEXT_NAMES; a file without names has the label in
    its first column and the text in its second. Else the columns are those named so (TEXT_NAMES, LABEL_NAMES), and for numbers
    the first column that holds numbers that are not all whole.

    Args:
        path: the file.
        numbers: labels are numbers.
        text_column, label_column: a column's name or its number from 1, where that is not right.
        encoding: as `read_text`.

    Raises:
        UserError: no such column, a line with too few fields, an empty text or label, or a label that is no number; with the line.

    Example:
        >>> read_labelled(Path("sms-spam.tsv"))[0].label  # doctest: +SKIP
        'ham'
    """
    names, rows = _rows(path, encoding)
    if not rows:
        raise UserError(f"{path}: holds no records; accepted is one labelled text a line")
    width = max(len(fields) for _, fields in rows)
    text = _column(path, text_column, "--text-column", names, width)
    label = _column(path, label_column, "--label-column", names, width)
    if text is None:
        text = 1 if names is None else _find(names, TEXT_NAMES)
    if label is None:
        label = 0 if names is None else _find(names, LABEL_NAMES)
        if label is None and numbers:
            label = _number_column(rows, width)
    columns = ", ".join(names) if names else f"{width} without names"
    for what, place in (("text", text), ("label", label)):
        if place is None:
            raise UserError(f"{path}: which column is the {what}? It has {columns}; say so with --{what}-column")
    assert text is not None
    assert label is not None
    found = []
    for line, fields in rows:
        if len(fields) <= max(text, label):
            raise UserError(
                f"{path}, line {line}: has {len(fields)} field{'s' * (len(fields) != 1)}; "
                f"accepted is a label in field {label + 1} and a text in field {text + 1}, separated by "
                f"{'commas' if path.suffix.lower() == '.csv' else 'tabs'}"
            )
        value, words = fields[label].strip(), fields[text].strip()
        if not value or not words:
            raise UserError(f"{path}, line {line}: the {'text' if value else 'label'} is empty")
        if numbers and _number(value) is None:
            raise UserError(f"{path}, line {line}: the label is {value!r}; accepted is a finite number")
        found.append(Labelled(words, value, line))
    return found


def read_texts(path: Path, *, text_column: str | None = None, encoding: str | None = None) -> list[str]:
    """The texts of a table, or of a .txt file one a line, for prediction; labels beside them are not read.

    Raises:
        UserError: no such column, no text, or a line without one.
    """
    names, rows = _rows(path, encoding)
    if not rows:
        raise UserError(f"{path}: holds no texts")
    width = max(len(fields) for _, fields in rows)
    place = _column(path, text_column, "--text-column", names, width)
    if place is None:
        place = _find(names, TEXT_NAMES) if names is not None else min(1, width - 1)
    if place is None:
        raise UserError(f"{path}: which column is the text? It has {', '.join(names or ())}; say so with --text-column")
    for line, fields in rows:
        if len(fields) <= place or not fields[place].strip():
            raise UserError(f"{path}, line {line}: has no text in field {place + 1}")
    return [fields[place].strip() for _, fields in rows]


def _turns(record: Any) -> list[Message]:
    """The messages of one record; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object with keys")
    if "messages" in record or "conversations" in record:
        key, role_key, content_key = (
            ("messages", "role", "content") if "messages" in record else ("conversations", "from", "value")
        )
        turns = record[key]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{key} is not a list of turns")
        found = []
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
                raise ValueError(f"turn {number} of {key} has no {role_key!r} and {content_key!r}")
            role, content = turn[role_key], turn[content_key]
            if not isinstance(role, str) or role not in ROLES:
                raise ValueError(f"the {role_key} of turn {number} is {role!r}; known are {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise ValueError(f"the {content_key} of turn {number} is {type(content).__name__}, not text")
            found.append(Message(ROLES[role], content))
        return found
    if "instruction" in record and "output" in record:
        parts = {key: record.get(key) or "" for key in ("instruction", "input", "output", "system")}
        for key, value in parts.items():
            if not isinstance(value, str):
                raise ValueError(f"{key} is {type(value).__name__}, not text")
        question = parts["instruction"] + ("\n\n" + parts["input"] if parts["input"] else "")
        system = [Message("system", parts["system"])] if parts["system"] else []
        return [*system, Message("user", question), Message("assistant", parts["output"])]
    raise ValueError(f"has the keys {', '.join(map(str, record)) or '(none)'}")


def read_conversations(path: Path, encoding: str | None = None) -> list[Conversation]:
    """The conversations of a JSON array or JSON Lines file; layouts may be mixed.

    Raises:
        UserError: a record in none of the layouts, or without an answer of the assistant to learn; with its line.

    Example:
        >>> read_conversations(Path("instruction-data.json"))[0].messages[0].role  # doctest: +SKIP
        'user'
    """
    text = read_text(path, encoding)
    found = []
    for line, record in _json_records(path, text):
        try:
            messages = _turns(record)
        except ValueError as error:
            raise UserError(
                f"{path}, line {line}: {error}; accepted are instruction and output (Alpaca), conversations (ShareGPT) or "
                "messages (OpenAI)"
            ) from error
        if not any(message.role == "assistant" and message.content for message in messages):
            raise UserError(
                f"{path}, line {line}: holds no answer of the assistant, so there is nothing to learn from it"
            )
        found.append(Conversation(tuple(messages), line))
    if not found:
        raise UserError(f"{path}: holds no conversations")
    return found
