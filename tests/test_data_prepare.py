"""`fastgpt data prepare`: shards hold the text, stops lose nothing, and input that is wrong is told by file and line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run

from fastgpt.cli import main
from fastgpt.data import prepare as module
from fastgpt.data import reader as reader_module
from fastgpt.data.loader import Loader
from fastgpt.data.prepare import prepare
from fastgpt.data.reader import Reader
from fastgpt.data.shards import ShardedTokens, open_shards, verify_shards
from fastgpt.data.sources import find_sources
from fastgpt.errors import UserError
from fastgpt.tokenizer import CharTokenizer, Tokenizer

TEXT = "".join(f"line {i} of a text, mit Umläuten äöü and {i * 7919 % 1000} things.\n" for i in range(3000))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and batches so small that a test has many of them, and a note after each."""
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 2000)
    monkeypatch.setattr(module, "BATCH_BYTES", 6000)
    monkeypatch.setattr(module, "JOURNAL_S", -1.0)


def records(path: Path, n: int = 400, field: str = "text") -> list[str]:
    draw = random.Random(3)
    texts = [" ".join(draw.choice(["apple", "pear", "ähre", "fig"]) for _ in range(12)) + f" {i}" for i in range(n)]
    path.write_text(
        "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8"
    )
    return texts


def decoded(folder: Path, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """The documents of each split, from the shards."""
    train, val, _ = open_shards(folder)
    found = {}
    for name, tokens in (("train", train), ("val", val)):
        ids = tokens[:].astype(np.int64)
        cuts = np.flatnonzero(ids == tokenizer.eot_token)
        assert cuts[-1] == len(ids) - 1
        found[name] = [
            tokenizer.decode(part[part != tokenizer.eot_token].tolist()) for part in np.split(ids, cuts[:-1] + 1)
        ]
    return found


@pytest.mark.usefixtures("small")
def test_text_comes_back_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One text: its end is held out, nothing is lost at the seams, and the ids are those of encoding each part at once."""
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    manifest = prepare(find_sources([path]), tokenizer, tmp_path / "out", Reader(0.1), shard_tokens=5000)
    found = decoded(tmp_path / "out", tokenizer)
    assert len(found["train"]) == len(found["val"]) == 1
    assert found["train"][0] + found["val"][0] == TEXT
    assert 0.08 < len(found["val"][0]) / len(TEXT) < 0.12
    train, _, _ = open_shards(tmp_path / "out")
    assert train[: len(train) - 1].tolist() == tokenizer.encode(found["train"][0])
    assert manifest["train"]["bytes"] == len(found["train"][0].encode())
    assert [shard["tokens"] for shard in manifest["train"]["shards"][:-1]] == [5000] * (len(train) // 5000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Every record is a document of one split, decided by its text: a copy is never on the other side."""
    texts = records(tmp_path / "a.jsonl", field="body")
    source = tmp_path / "a.jsonl"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        source = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"body": texts}), source, row_group_size=64)
    reader = Reader(0.2, "body")
    prepare(find_sources([source, source]), tokenizer, tmp_path / "out", reader, shard_tokens=4000)
    found = decoded(tmp_path / "out", tokenizer)
    assert sorted(found["train"] + found["val"]) == sorted(texts * 2)
    assert not set(found["train"]) & set(found["val"])
    assert 0.1 < len(found["val"]) / 800 < 0.3


def everything(folder: Path, tokenizer: Tokenizer) -> str:
    found = decoded(folder, tokenizer)
    return "".join(found["train"] + found["val"])


def test_many_files_are_held_out_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for i in range(60):
        (tmp_path / "in" / str(i % 7)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(i % 7) / f"{i}.txt").write_text(f"file {i} " * 30)
    (tmp_path / "in" / ".hidden").write_text("no")
    prepare(find_sources([tmp_path / "in"]), tokenizer, tmp_path / "out", Reader(0.2))
    found = decoded(tmp_path / "out", tokenizer)
    assert sorted(found["train"] + found["val"]) == sorted(f"file {i} " * 30 for i in range(60))
    assert found["val"]


def test_characters(tmp_path: Path) -> None:
    """A tokenizer without an end-of-text token; a character that it has not is an error with the file."""
    path = tmp_path / "a.txt"
    path.write_text("abc\n" * 500)
    prepare(find_sources([path]), CharTokenizer.train("abc\n"), tmp_path / "out", Reader(0.1))
    assert len(open_shards(tmp_path / "out")[0]) > 1700
    path.write_text("abcX\n" * 500)
    with pytest.raises(UserError, match=r"a\.txt.*'X'"):
        prepare(find_sources([path]), CharTokenizer.train("abc\n"), tmp_path / "out2", Reader(0.1))


@pytest.mark.usefixtures("small")
def test_stops_change_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Stopped after every single batch in turn, with rubbish behind the open shards as a kill leaves it: the same bytes."""
    texts = tmp_path / "a.txt"
    texts.write_text(TEXT[:40000], encoding="utf-8")
    records(tmp_path / "b.jsonl", 300)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write("not json\n" * 3 + json.dumps({"text": "word " * 3000}) + "\n")
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    if has_parquet():
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"text": [f"row {i} " * 9 for i in range(500)]}), tmp_path / "c.parquet", row_group_size=99
        )
        inputs.append(tmp_path / "c.parquet")
    whole = prepare(find_sources(inputs), tokenizer, tmp_path / "whole", Reader(0.1, bad="skip"), shard_tokens=3000)

    class Stop(Exception):
        pass

    stops = 0

    def stop(done: int, total: int, tokens: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stop

    while True:
        calls = 0
        try:
            manifest = prepare(
                find_sources(inputs),
                tokenizer,
                tmp_path / "out",
                Reader(0.1, bad="skip"),
                shard_tokens=3000,
                threads=1 + stops % 2,
                progress=stop,
            )
            break
        except Stop:
            stops += 1
            for path in (tmp_path / "out").glob("*.bin"):
                state = json.loads((tmp_path / "out" / "progress.json").read_text())
                finished = [shard["file"] for split in ("train", "val") for shard in state[split]["shards"]]
                if path.name not in finished:
                    with open(path, "ab") as file:
                        file.write(b"rubbish")
    assert stops > 5
    assert manifest == whole
    assert whole["skipped"] == 3
    assert verify_shards(tmp_path / "out") == verify_shards(tmp_path / "whole") > 0
    assert not (tmp_path / "out" / "progress.json").exists()


def has_parquet() -> bool:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def test_kill(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """kill -9 in the middle, several times; the command goes on and ends with what an undisturbed one has."""
    draw = random.Random(1)
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(TEXT * 20, encoding="utf-8")
    code = (
        "import sys, time; from fastgpt.data import prepare as m, reader as r; from fastgpt.cli import main;"
        "r.PIECE_BYTES, m.BATCH_BYTES, m.JOURNAL_S = 20000, 60000, 0.0; real = m._Encoder.__call__;"
        "m._Encoder.__call__ = lambda self, b: (time.sleep(0.02), real(self, b))[1];"
        "sys.exit(main(['data', 'prepare', *sys.argv[1:]]))"
    )
    arguments = [str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--shard-tokens", "50000"]
    killed = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "out")])
        try:
            assert process.wait(0.5 + draw.random() * 0.7) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    else:
        assert subprocess.run([sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "out")]).returncode == 0
    assert killed
    whole = tiny_run.run("data", "prepare", *arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    both = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "whole")]
    assert both[0]["train"]["tokens"] == both[1]["train"]["tokens"]
    assert [s["sha256"] for s in both[0]["train"]["shards"]] == [s["sha256"] for s in both[1]["train"]["shards"]]


WRONG = {
    b'{"text": "a"}\n{"text": \n': r"a\.jsonl, line 2: not JSON \(Expecting value at column 9\)",
    b'{"text": "a"}\n\n["text"]\n': r"line 3: holds list; accepted is an object",
    b'{"text": "a"}\r\n{"txt": "a"}\r\n': r"line 2: no field 'text'; it has 'txt'",
    b'{"text": 5}\n': r"line 1: the field 'text' holds int",
    b'{"text": "a"}\n{"text": "caf\xe9"}\n': r"line 2: not UTF-8 \(byte 0xe9 at column 14\)",
}


@pytest.mark.parametrize("data", WRONG)
def test_wrong_records_name_the_line(tmp_path: Path, tokenizer: Tokenizer, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=WRONG[data]):
        prepare(find_sources([tmp_path / "a.jsonl"]), tokenizer, tmp_path / "out", Reader(0.5))


def test_wrong_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Bytes that are no UTF-8, told by line; binary and UTF-16 files; with `skip` and `replace` the rest is prepared."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "good.txt").write_text("good\n" * 200)
    (inputs / "latin.txt").write_bytes(b"fine\n" * 9 + b"caf\xe9\n" + b"fine\n" * 9)
    with pytest.raises(UserError, match=r"latin\.txt, line 10: not UTF-8 \(byte 0xe9 at offset 48\)"):
        prepare(find_sources([inputs]), tokenizer, tmp_path / "o1", Reader(0.1))
    reader = Reader(0.1, bad="skip")
    prepare(find_sources([inputs]), tokenizer, tmp_path / "o2", reader)
    assert everything(tmp_path / "o2", tokenizer) == "good\n" * 200
    assert reader.skipped == 1
    prepare(find_sources([inputs]), tokenizer, tmp_path / "o3", Reader(0.1, bad="replace"))
    assert "caf\ufffd\n" in everything(tmp_path / "o3", tokenizer)
    for data, words in (
        (b"ab\0c", "binary"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"", "empty"),
        (b"ab\xc3", "cut short"),
    ):
        (inputs / "latin.txt").write_bytes(data)
        with pytest.raises(UserError, match=words):
            prepare(find_sources([inputs]), tokenizer, tmp_path / words, Reader(0.1))
    (inputs / "b.parquet").write_bytes(b"PAR1 no")
    (inputs / "latin.txt").unlink()
    if has_parquet():
        with pytest.raises(UserError, match="not a readable Parquet"):
            prepare(find_sources([inputs]), tokenizer, tmp_path / "o5", Reader(0.1))


@pytest.mark.usefixtures("small")
def test_line_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "unix", Reader(0.1))
    assert everything(tmp_path / "unix", tokenizer) == TEXT
    prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "kept", Reader(0.1, newlines="keep"))
    assert everything(tmp_path / "kept", tokenizer) == TEXT.replace("\n", "\r\n")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_huge_line(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """A line of 20 MB, and a run of 3 MB without any boundary in it."""
    text = ("word " * 4_000_000) + "x" * 3_000_000
    short = "".join(json.dumps({"text": f"end {i}"}) + "\n" for i in range(9))
    data = text if kind == "txt" else json.dumps({"text": text}) + "\n" + short
    (tmp_path / f"a.{kind}").write_text(data)
    prepare(find_sources([tmp_path / f"a.{kind}"]), tokenizer, tmp_path / "out", Reader(0.3))
    found = decoded(tmp_path / "out", tokenizer)
    assert sum(len(text) for texts in found.values() for text in texts) == len(text) + (45 if kind == "jsonl" else 0)


def test_folders_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    source = find_sources([tmp_path / "a.txt"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        prepare(source, tokenizer, tmp_path / "full", Reader(0.1))
    if os.getuid():
        (tmp_path / "read-only").mkdir(mode=0o555)
        with pytest.raises(UserError, match="Permission denied"):
            prepare(source, tokenizer, tmp_path / "read-only" / "out", Reader(0.1))
    with pytest.raises(UserError, match="cannot write"):  # for root too
        prepare(source, tokenizer, Path("/proc/nothing"), Reader(0.1))

    real = module._Split.write

    def full(self: module._Split, ids: np.ndarray) -> None:
        real(self, ids[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Split, "write", full)
    with pytest.raises(UserError, match="no disk space left; what is done stays"):
        prepare(source, tokenizer, tmp_path / "out", Reader(0.1))
    monkeypatch.setattr(module._Split, "write", real)
    prepare(source, tokenizer, tmp_path / "out", Reader(0.1))
    assert everything(tmp_path / "out", tokenizer) == TEXT


def arrow(path: Path, texts: list[str | None], rows: int = 70) -> Path:
    """The Arrow stream that datasets writes."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def test_a_data_set_that_was_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What Dataset.save_to_disk leaves: Arrow files and JSON that is no text. Also read on from any row."""
    texts = records(tmp_path / "texts.jsonl")
    folder = tmp_path / "saved"
    folder.mkdir()
    arrow(folder / "data-00000-of-00002.arrow", texts[:250])
    arrow(folder / "data-00001-of-00002.arrow", texts[250:])
    for name in ("dataset_info.json", "state.json"):
        (folder / name).write_text('{"text": "not this"}')
    sources = find_sources([folder])
    assert [source.name for source in sources] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    prepare(sources, tokenizer, tmp_path / "out", Reader(0.1))
    prepare(find_sources([tmp_path / "texts.jsonl"]), tokenizer, tmp_path / "same", Reader(0.1))
    assert decoded(tmp_path / "out", tokenizer) == decoded(tmp_path / "same", tokenizer)
    for start in (0, 69, 70, 200, 250):
        pieces = list(Reader(0.1).read(sources[0], start))
        assert [piece.text for piece in pieces] == texts[start:250]
        assert [piece.offset for piece in pieces] == list(range(start + 1, 251))


def test_a_data_set_of_the_hub(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = arrow(tmp_path / "cache.arrow", ["one text", "two texts", None]), []

    def load_dataset(name: str, config: str | None, split: str) -> SimpleNamespace:
        asked.append((name, config, split))
        if name == "gone":
            raise FileNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        return SimpleNamespace(cache_files=[{"filename": str(path)}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (source,) = find_sources(["hf:owner/name:en@validation"])
    find_sources(["hf:name"])
    assert asked == [("owner/name", "en", "validation"), ("name", None, "train")]
    with pytest.raises(
        UserError, match=r"hf:gone cannot be loaded: Dataset 'gone' doesn't exist on the Hub; accepted is"
    ):
        find_sources(["hf:gone"])
    with pytest.raises(UserError, match=r"cache\.arrow, row 3: the column 'text' holds NoneType"):
        list(Reader(0.1).read(source))
    assert [piece.text for piece in Reader(0.1, bad="skip").read(source)] == ["one text", "two texts"]
    with pytest.raises(UserError, match=r"no column 'body'; it has id, text"):
        list(Reader(0.1, text_field="body").read(source))
    path.write_bytes(b"no Arrow at all, this")
    with pytest.raises(UserError, match="is not a readable Arrow file"):
        list(Reader(0.1).read(source))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:name needs datasets: pip install 'fastgpt-kernels\[datasets\]'"):
        find_sources(["hf:name"])


def test_other_settings_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "out", Reader(0.1))
    said: list[str] = []
    prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "out", Reader(0.1), say=said.append)
    assert "already prepared" in said[0]
    with pytest.raises(UserError, match="val-fraction"):
        prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "out", Reader(0.2))
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(find_sources([tmp_path / "a.txt"]), Tokenizer.train([TEXT], 300), tmp_path / "out", Reader(0.1))
    (tmp_path / "a.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match="sources that have changed"):
        prepare(find_sources([tmp_path / "a.txt"]), tokenizer, tmp_path / "out", Reader(0.1))


def test_corrupt_shard(tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "out"
    prepare(find_sources([tmp_path / "a.txt"]), tokenizer, out, Reader(0.1), shard_tokens=20_000)
    shard = out / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[1001] ^= 64
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00001\.bin has changed"):
        verify_shards(out)
    for arguments in (["data", "verify", str(out)], ["train", "--data", str(out), "--out", str(tmp_path / "run")]):
        assert main(arguments) == 2
        assert "train-00001.bin" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    shard.write_bytes(data[:-2])
    with pytest.raises(UserError, match="is damaged"):
        open_shards(out)


def test_sharded_tokens_are_one_array() -> None:
    whole = np.random.default_rng(0).integers(0, 1000, 500).astype(np.uint16)
    tokens = ShardedTokens(np.split(whole, [100, 101, 333]))
    assert len(tokens) == 500
    for begin, end in ((0, 500), (99, 102), (100, 101), (340, 400), (50, 50), (-20, None)):
        assert tokens[begin:end].tolist() == whole[begin:end].tolist()
    positions = np.random.default_rng(1).integers(0, 500, (7, 33))
    assert (tokens[positions] == whole[positions]).all()
    with pytest.raises(IndexError):
        tokens[np.array([500])]
    for step in (0, 3):
        for ours, theirs in zip(
            Loader(tokens, 8, 4, seed=5).batch(step), Loader(whole, 8, 4, seed=5).batch(step), strict=True
        ):
            assert ours.equal(theirs)


def test_train_on_shards(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """prepare, train and resume through the command line."""
    records(tmp_path / "a.jsonl", 2000)
    shards = str(tmp_path / "d")
    options = ["--vocab-size", "300", "--val-fraction", "0.1", "--out", shards]
    assert main(["data", "prepare", str(tmp_path / "a.jsonl"), *options]) == 0
    assert "held out" in capfd.readouterr().out
    assert main(tiny_run.arguments(tmp_path / "d", tmp_path / "run", tokenizer__type="bpe")) == 0
    assert "validation loss" in capfd.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "16"]) == 0
    assert len(list((tmp_path / "run" / "data").iterdir())) == 1  # the shards were not copied
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "20"]) == 2
    assert "is gone" in capfd.readouterr().err
