"""`fastgpt tokenizer`: training, both directions, what inspect shows, and what is refused."""

import itertools
import json
import re

import pytest

from fastgpt.cli import main
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.commands import coloured, open_tokenizer, report, visible

TEXT = "the cat sat on the mat, the cat that sat\n" * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT)
    out = folder / "small.json"
    options = ["--vocab-size", "268", "--special", "<|end|>", "--special", "<|pad|>", "--out", str(out)]
    assert main(["tokenizer", "train", str(folder / "text.txt"), *options]) == 0
    return out


def test_training_gives_what_the_class_gives(trained):
    expected = Tokenizer.train([TEXT], 268, special_tokens=["<|end|>", "<|pad|>"])
    loaded = Tokenizer.load(trained)
    assert loaded.tokens == expected.tokens
    assert loaded.special_tokens == expected.special_tokens == {"<|end|>": 266, "<|pad|>": 267}


def test_encode_prints_the_ids(trained, capsys):
    tokenizer = Tokenizer.load(trained)
    assert main(["tokenizer", "encode", str(trained), "the", "cat"]) == 0
    assert [int(word) for word in capsys.readouterr().out.split()] == tokenizer.encode("the cat")
    assert main(["tokenizer", "encode", str(trained), "--json", "the<|end|>"]) == 0
    assert json.loads(capsys.readouterr().out) == tokenizer.encode_ordinary("the<|end|>")
    assert main(["tokenizer", "encode", str(trained), "--json", "--allow-special", "the<|end|>"]) == 0
    assert json.loads(capsys.readouterr().out) == [*tokenizer.encode("the"), 266]


def test_decode_gives_the_bytes_back(trained, tmp_path, capfdbinary):
    ids = tmp_path / "ids.txt"
    text = "the mat \u00e9\n"
    ids.write_text(json.dumps(Tokenizer.load(trained).encode(text)))
    assert main(["tokenizer", "decode", str(trained), "--file", str(ids)]) == 0
    assert capfdbinary.readouterr().out == text.encode()
    assert main(["tokenizer", "decode", str(trained), "255"]) == 0
    assert capfdbinary.readouterr().out == Tokenizer.load(trained).decode_bytes([255])


def test_other_formats_are_opened(trained, tmp_path):
    tokenizer = Tokenizer.load(trained)
    tokenizer.save_huggingface(tmp_path / "tokenizer.json")
    tokenizer.save_tiktoken(tmp_path / "small.tiktoken")
    want = tokenizer.encode(TEXT)
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).encode(TEXT) == want
    assert open_tokenizer(str(tmp_path)).encode(TEXT) == want
    assert open_tokenizer(str(tmp_path / "small.tiktoken"), "gpt2").encode(TEXT) == want


def test_inspect_counts_and_shows(trained):
    tokenizer = Tokenizer.load(trained)
    text = "the cat's caf\u00e9"
    shown = report(tokenizer, text, colour=False, limit=500)
    ids = tokenizer.encode(text)
    assert f"15 bytes, {len(tokenizer.pretokens(text))} pre-tokens, {len(ids)} tokens" in shown
    assert f"{len(ids) / 15:.3f} tokens per byte" in shown
    assert f"unused by this text: {266 - len(set(ids))} of 266 tokens" in shown
    longest = max(tokenizer.tokens, key=len)
    first = shown.split("longest tokens:\n")[1].splitlines()[0]
    assert first.split()[:3] == [str(tokenizer.tokens[longest]), str(len(longest)), "bytes"]
    assert "<|end|> 266" in shown
    assert f"{len(ids) - 2} tokens more" in report(tokenizer, text, colour=False, limit=2)


def test_colours_change_from_token_to_token_and_text_stays():
    pieces = [b"the", b" cat", b"\n", b"\xff"]
    shown = coloured(pieces, True)
    backgrounds = re.findall(r"\x1b\[(\d+);30m", shown)
    assert len(backgrounds) == 4
    assert all(a != b for a, b in itertools.pairwise(backgrounds))
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == "the cat\\n\n\\xff"
    assert coloured(pieces, False) == "|the| cat|\\n|\\xff|"
    assert visible(b"a\x00\xc3\xa9\x1b") == "a\\x00\u00e9\\x1b"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "tokenizer: got nothing"),
        (["trian"], "got trian"),
        (["encode", "no-such-encoding", "x"], "'no-such-encoding'"),
        (["encode", "FILE", "x", "--file", "y"], "both"),
        (["encode", "FILE", "--file", "not-there.txt"], "not-there.txt"),
        (["decode", "FILE", "99999"], "99999"),
        (["decode", "FILE", "one"], "'one'"),
        (["train", "not-there.txt", "--vocab-size", "300", "--out", "x"], "not-there.txt"),
        (["inspect", "FILE", "--colour"], "unknown option --colour"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(trained, arguments, named, capsys):
    assert main(["tokenizer", *[str(trained) if word == "FILE" else word for word in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgpt: error: ")
    assert named in error
    assert error.count("\n") == 1


def test_help_names_every_command(capsys):
    assert main(["tokenizer", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("train", "encode", "decode", "inspect"))
    with pytest.raises(SystemExit) as done:
        main(["tokenizer", "inspect", "--help"])
    assert done.value.code == 0
    assert "TOKENIZER" in capsys.readouterr().out
