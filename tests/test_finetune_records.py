"""Labelled texts and conversations are read as they were written, and what cannot be used is named with its line."""

import json
from pathlib import Path

import pytest
from paths import shared

from fastgpt.errors import UserError
from fastgpt.finetune.records import Message, read_conversations, read_labelled, read_texts


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_without_names_quotes_and_trailing_tabs(tmp_path):
    path = _file(tmp_path, "sms.tsv", 'ham\t"he said ""the cave""."\t\t\t\nspam\tFree "entry"\t\t\t\n')
    found = read_labelled(path)
    assert [(r.label, r.text, r.line) for r in found] == [
        ("ham", 'he said "the cave".', 1),
        ("spam", 'Free "entry"', 2),
    ]


def test_a_quote_that_is_dialogue_stays(tmp_path):
    path = _file(tmp_path, "a.tsv", 'label\ttext\nx\t"Come in," she said, "at once"\n')
    assert read_labelled(path)[0].text == '"Come in," she said, "at once"'


def test_number_column_is_found_by_its_values(tmp_path):
    path = _file(tmp_path, "r.tsv", "id\teasiness\ttext\n400\t-0.34\ta b\n401\t1\tc d\n")
    assert [float(r.label) for r in read_labelled(path, numbers=True)] == [-0.34, 1.0]
    assert read_labelled(path, numbers=True, label_column="id")[0].label == "400"
    assert read_labelled(path, numbers=True, label_column="1")[0].label == "400"
    with pytest.raises(UserError, match=r"'easines'; did you mean 'easiness'\?"):
        read_labelled(path, numbers=True, label_column="easines")


def test_csv_field_with_line_ends_keeps_line_numbers(tmp_path):
    path = _file(tmp_path, "a.csv", 'label,text\nx,"one\ntwo, three"\ny,four\n')
    assert [(r.text, r.line) for r in read_labelled(path)] == [("one\ntwo, three", 2), ("four", 4)]
    broken = _file(tmp_path, "b.csv", 'label,text\nx,one\ny,"two"x\n')
    with pytest.raises(UserError, match="line 3: not CSV"):
        read_labelled(broken)


def test_jsonl_table(tmp_path):
    path = _file(tmp_path, "a.jsonl", '{"text": "good", "label": 1.5}\n\n{"label": 2, "text": "bad"}\n')
    assert [(r.text, r.label, r.line) for r in read_labelled(path, numbers=True)] == [
        ("good", "1.5", 1),
        ("bad", "2", 3),
    ]


def test_windows_line_ends_and_byte_order_marks(tmp_path):
    plain = read_labelled(_file(tmp_path, "a.tsv", "ham\tcafé\nspam\twin\n"))
    assert read_labelled(_file(tmp_path, "b.tsv", "ham\tcafé\r\nspam\twin\r\n")) == plain
    assert read_labelled(_file(tmp_path, "c.tsv", b"\xef\xbb\xbf" + "ham\tcafé\nspam\twin\n".encode())) == plain
    assert read_labelled(_file(tmp_path, "d.tsv", "ham\tcafé\r\nspam\twin\r\n".encode("utf-16"))) == plain


def test_mixed_encodings_name_the_line(tmp_path):
    path = _file(tmp_path, "a.tsv", "ham\tcafé\n".encode() + "ham\tcafé\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 2: byte 0xE9 is not utf-8.*--encoding"):
        read_labelled(path)
    assert read_labelled(_file(tmp_path, "b.tsv", "x\tcafé\n".encode("latin-1")), encoding="latin-1")[0].text == "café"
    with pytest.raises(UserError, match="--encoding is 'nonsense'"):
        read_labelled(path, encoding="nonsense")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ham\tone\nspam two\n", "line 2: has 1 field; accepted is a label in field 1 and a text in field 2"),
        ("ham\tone\n\ttwo\n", "line 2: the label is empty"),
        ("ham\tone\nspam\t\n", "line 2: the text is empty"),
        ("\n", "holds no records"),
        ("words\ttext\nham\tone\n", "which column is the label"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_labelled(_file(tmp_path, "a.tsv", content))


def test_a_label_that_is_no_number(tmp_path):
    for value in ("high", "nan", "inf"):
        path = _file(tmp_path, "a.tsv", f"score\ttext\n1.5\tx\n{value}\ty\n")
        with pytest.raises(UserError, match=f"line 3: the label is '{value}'; accepted is a finite number"):
            read_labelled(path, numbers=True)


def test_texts_for_prediction(tmp_path):
    assert read_texts(_file(tmp_path, "a.txt", "one\n\ntwo\n")) == ["one", "two"]
    assert read_texts(_file(tmp_path, "a.tsv", "ham\tone\nspam\ttwo\n")) == ["one", "two"]
    assert read_texts(_file(tmp_path, "b.tsv", "id\ttext\n1\tone\n")) == ["one"]


ANSWER = Message("assistant", "4")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    ],
)
def test_three_layouts_are_one_conversation(tmp_path, record):
    lines = _file(tmp_path, "a.jsonl", json.dumps(record) + "\n" + json.dumps(record) + "\n")
    array = _file(tmp_path, "a.json", json.dumps([record, record], indent=2))
    for path in (lines, array):
        assert [c.messages for c in read_conversations(path)] == [(Message("user", "2 + 2?"), ANSWER)] * 2


def test_input_and_system_are_kept(tmp_path):
    record = {"instruction": "Spell.", "input": "freind", "output": "friend", "system": "Be short."}
    (found,) = read_conversations(_file(tmp_path, "a.jsonl", json.dumps(record)))
    assert found.messages == (
        Message("system", "Be short."),
        Message("user", "Spell.\n\nfreind"),
        Message("assistant", "friend"),
    )


GOOD = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            '{"question": "a", "answer": "b"}',
            "line 3: has the keys question, answer; accepted are instruction and output",
        ),
        ('{"instruction": "a", "output": ""}', "line 3: holds no answer"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 3: the role of turn 1 is 'robot'"),
        ('{"messages": [{"role": "user"}]}', "line 3: turn 1 of messages has no"),
        ('{"messages": []}', "line 3: messages is not a list of turns"),
        ('{"instruction": 5, "output": "b"}', "line 3: instruction is int"),
        ("[1, 2]", "line 3: holds list"),
        ('{"instruction": ', "line 3: not JSON"),
        ('{"a":' * 100_000, "line 3: nested too deeply"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        read_conversations(_file(tmp_path, "a.jsonl", f"{GOOD}\n{GOOD}\n{bad}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[\n{GOOD},\n{GOOD}\n", "line 4: the JSON array has no end"),
        (f"[\n{GOOD}\n{GOOD}\n]", "line 3: not JSON: a comma is missing"),
        (f"[\n{GOOD},\n{{'a'}}\n]", "line 3: not JSON"),
    ],
)
def test_a_bad_array_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_conversations(_file(tmp_path, "a.json", text))


def test_the_shared_files():
    sms = read_labelled(shared("data/sms-spam.tsv"))
    assert len(sms) == 5574
    assert sum(record.label == "spam" for record in sms) == 747
    assert not any(record.text.endswith("\t") for record in sms)
    numbers = [float(r.label) for r in read_labelled(shared("data/readability.tsv"), numbers=True)]
    assert len(numbers) == 4609
    assert abs(sum(numbers) / len(numbers) + 0.97) < 0.01  # the mean easiness that the data's description states
    assert len(read_conversations(shared("data/instruction-data.json"))) == 1100
