"""The tokenizers' behaviour: round trips, special tokens, errors, saving, streaming."""

import itertools
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.tokenizer import PATTERNS, CharTokenizer, Tokenizer, load_tokenizer

CORPUS = (
    "The quick brown fox jumps over the lazy dog; don't you think it's 1234567 times better?\n\n    def f(x):\n\treturn x\r\n"
    "Größe, naïveté, Ελληνικά, русский, 中文字符, 日本語テキスト, ภาษาไทย, हिन्दी, 🙂🇺🇸\n"
) * 20
CUSTOM = r"\w+|[^\w\s]+|\s+"  # matches everything, and nothing built in does the same


@pytest.fixture(scope="module", params=[*PATTERNS, CUSTOM])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([CORPUS], 600, pattern=request.param, special_tokens=("<|endoftext|>", "<|end|>"))


def test_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(CORPUS)
    assert tokenizer.decode(ids) == CORPUS
    assert len(ids) < len(CORPUS.encode()) / 2
    assert tokenizer.encode_numpy(CORPUS).tolist() == ids
    assert tokenizer.encode_numpy(CORPUS).dtype == np.uint32
    assert tokenizer.count(CORPUS) == len(ids)
    assert tokenizer.encode_bytes(CORPUS.encode()) == ids
    assert "".join(tokenizer.pretokens(CORPUS)) == CORPUS


def test_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.encode_numpy("").shape == (0,)
    assert tokenizer.encode_numpy("").dtype == np.uint32
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.empty(0, np.int64)) == ""
    assert tokenizer.pretokens("") == []
    assert tokenizer.count("") == 0
    assert tokenizer.encode_batch([]) == []
    ids, offsets = tokenizer.encode_ordinary_batch_numpy([])
    assert ids.tolist() == []
    assert offsets.tolist() == [0]


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_bytes(text.encode()) == ids
    assert "".join(tokenizer.stream_decode(ids)) == text


@given(data=st.binary())
def test_any_bytes_decode_to_themselves(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@given(texts=st.lists(st.text(), max_size=5))
def test_batches_equal_single_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = [tokenizer.encode_ordinary(text) for text in texts]
    assert tokenizer.encode_ordinary_batch(texts, num_threads=2) == expected
    ids, offsets = tokenizer.encode_ordinary_batch_numpy(texts, num_threads=2)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected


def test_large_batches_on_threads_equal_one_thread(tokenizer: Tokenizer) -> None:
    if tokenizer.pattern_name is None:
        pytest.skip("only built-in patterns run on threads")
    texts = [CORPUS * n for n in (0, 1, 600, 3, 200, 0)]  # more than a thread's share, and a text that must be cut
    expected = [tokenizer.encode_ordinary(text) for text in texts]
    for threads in (1, 2, 5):
        assert tokenizer.encode_ordinary_batch(texts, num_threads=threads) == expected
        ids, offsets = tokenizer.encode_ordinary_batch_numpy(texts, num_threads=threads)
        assert np.array_equal(ids, np.concatenate([np.array(part, np.uint32) for part in expected]))
        assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


def test_arrays_that_live_share_no_memory() -> None:
    # Large buffers are used again when their arrays are gone: more of them, and of other sizes, than are kept.
    bytes_only = Tokenizer({bytes([byte]): byte for byte in range(256)})
    texts = [chr(ord("a") + i) * 600_000 for i in range(6)]
    for threads in (1, 2):
        live = [
            bytes_only.encode_ordinary_batch_numpy([text] * (1 + i), num_threads=threads)[0]
            for i, text in enumerate(texts)
        ]
        for i in (1, 3, 4):
            live[i] = live[0]
        for i in (4, 1, 3):
            live[i] = bytes_only.encode_ordinary_batch_numpy([texts[i]] * (1 + i), num_threads=threads)[0]
        for i, ids in enumerate(live):
            assert ids.size == 600_000 * (1 + i)
            assert np.all(ids == ord("a") + i)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    text = "a<|endoftext|>b<|end|><|endoftext|>"
    eot, end = tokenizer.special_tokens["<|endoftext|>"], tokenizer.special_tokens["<|end|>"]
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.eot_token == eot
    assert {eot, end} == {tokenizer.n_vocab - 2, tokenizer.n_vocab - 1}
    assert tokenizer.encode(text, allowed_special="all") == [*a, eot, *b, end, eot]
    one_allowed = tokenizer.encode(text, allowed_special={"<|end|>"}, disallowed_special=())
    assert one_allowed.count(end) == 1
    assert eot not in one_allowed
    assert tokenizer.decode(one_allowed) == text
    assert tokenizer.encode(text, disallowed_special=()) == tokenizer.encode_ordinary(text)
    assert not {eot, end} & set(tokenizer.encode_ordinary(text))
    assert tokenizer.encode_to_numpy(text, allowed_special="all").tolist() == [*a, eot, *b, end, eot]
    assert tokenizer.encode_batch([text, "a"], allowed_special="all") == [[*a, eot, *b, end, eot], a]
    with pytest.raises(ValueError, match="special token that is not allowed"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
        tokenizer.encode(text, allowed_special={"<|end|>"})
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode_batch(["a", text])
    assert tokenizer.encode_single_token("<|end|>") == end
    assert tokenizer.is_special_token(end)
    assert not tokenizer.is_special_token(97)


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31, 2**32, 2**63, 2**64, 2**100])
def test_bad_id_is_key_error(tokenizer: Tokenizer, bad: int) -> None:
    for call in (
        lambda: tokenizer.decode([97, bad]),
        lambda: tokenizer.decode_bytes([bad]),
        lambda: tokenizer.decode_single_token_bytes(bad),
        lambda: tokenizer.decode_tokens_bytes([bad]),
        lambda: tokenizer.stream_decoder().push(bad),
    ):
        with pytest.raises(KeyError, match=str(bad)):
            call()
    if -(2**63) <= bad < 2**63:
        with pytest.raises(KeyError):
            tokenizer.decode(np.array([97, bad]))


def test_wrong_types_are_type_errors(tokenizer: Tokenizer) -> None:
    for bad_text in (None, 3, b"bytes", ["list"]):
        for method in (
            tokenizer.encode,
            tokenizer.encode_ordinary,
            tokenizer.encode_numpy,
            tokenizer.count,
            tokenizer.pretokens,
        ):
            with pytest.raises(TypeError):
                method(bad_text)
    for bad_ids in (None, 3, "abc", b"abc", ["a"], [1.0], np.array([1.0]), np.array([[1]])):
        with pytest.raises(TypeError):
            tokenizer.decode(bad_ids)
    with pytest.raises(TypeError):
        tokenizer.encode_bytes("text")
    with pytest.raises(TypeError):
        tokenizer.encode_single_token(3)
    with pytest.raises(TypeError):
        tokenizer.encode_ordinary_batch(["a", 3])
    with pytest.raises(ValueError, match="num_threads"):
        tokenizer.encode_ordinary_batch(["a"], num_threads=0)
    with pytest.raises(KeyError):
        tokenizer.encode_single_token("no token has this text")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64"])
def test_decode_arrays(tokenizer: Tokenizer, dtype: str) -> None:
    ids = np.frombuffer(b"hello world", np.uint8).astype(dtype)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode(list(ids)) == "hello world"
    assert tokenizer.decode(ids[::2]) == "hlowrd"


def test_stream_gives_whole_characters_only(tokenizer: Tokenizer) -> None:
    for text in ("naïve 🙂 日本語", "🇺🇸" * 3):
        pieces = list(tokenizer.stream_decode(list(text.encode())))  # one id a byte
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(byte) for byte in "é".encode()] == ["", "é"]
    assert decoder.push(0xF0) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_decode_with_offsets(tokenizer: Tokenizer) -> None:
    text, offsets = tokenizer.decode_with_offsets(list("aé b".encode()))
    assert text == "aé b"
    assert offsets == [0, 1, 1, 2, 3]


def test_save_and_load_in_a_fresh_process(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    expected = tokenizer.encode(CORPUS + "<|end|>", allowed_special="all")
    code = (
        "import sys, json; from fastgpt.tokenizer import load_tokenizer; t = load_tokenizer(sys.argv[1]);"
        "print(json.dumps(t.encode(sys.stdin.buffer.read().decode(), allowed_special='all')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], input=(CORPUS + "<|end|>").encode(), capture_output=True, check=True
    )
    assert json.loads(run.stdout) == expected
    loaded = Tokenizer.load(path)
    assert loaded.encode(CORPUS + "<|end|>", allowed_special="all") == expected
    assert loaded.special_tokens == tokenizer.special_tokens
    assert (loaded.pattern, loaded.name, loaded.n_vocab) == (tokenizer.pattern, tokenizer.name, tokenizer.n_vocab)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json"]


def test_pickle(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert copy.special_tokens == tokenizer.special_tokens


def test_many_threads_at_once(tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode_ordinary(CORPUS)
    results: list[bool] = []

    def work() -> None:
        results.extend(tokenizer.encode_ordinary(CORPUS) == expected for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_import_does_not_import_torch() -> None:
    code = "import sys; from fastgpt import Tokenizer, CharTokenizer, load_tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1]", "format"),
        (b"{}", "format"),
        (b'{"format": "fastgpt-tokenizer", "version": 99, "type": "bpe"}', "version"),
        (b'{"format": "fastgpt-tokenizer", "version": 1, "type": "words"}', "words"),
        (b'{"format": "fastgpt-tokenizer", "version": 1, "type": "bpe"}', "damaged"),
        (b'{"format": "fastgpt-tokenizer", "version": 1, "type": "char"}', "damaged"),
        (b'{"format": "fastgpt-tokenizer", "version": 1, "type": "char", "characters": "aa"}', "twice"),
        (
            b'{"format": "fastgpt-tokenizer", "version": 1, "type": "bpe", "pattern": "gpt2", "special_tokens": {},'
            b'"tokens": ["YQ=="]}',
            "single byte",
        ),
        (
            b'{"format": "fastgpt-tokenizer", "version": 1, "type": "bpe", "pattern": "gpt2", "special_tokens": {},'
            b'"tokens": ["!!!"]}',
            "damaged",
        ),
    ],
)
def test_damaged_files(tmp_path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_truncated_file(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            load_tokenizer(path)
    with pytest.raises(OSError, match="missing"):
        load_tokenizer(tmp_path / "missing.json")


def test_constructor_errors() -> None:
    tokens = {bytes([i]): i for i in range(256)}
    for bad, message in [
        ({}, "single byte"),
        ({**tokens, b"": 256}, "empty"),
        ({**tokens, b"ab": 255}, "two tokens have the id"),
        ({**tokens, b"ab": 2**31}, "limit"),
        ({**tokens, b"ab": 2**29}, "proportion"),
    ]:
        with pytest.raises(ValueError, match=message):
            Tokenizer(bad)
    with pytest.raises(ValueError, match="of another token"):
        Tokenizer(tokens, special_tokens={"<|x|>": 97})
    with pytest.raises(TypeError, match="special_tokens"):
        Tokenizer(tokens, special_tokens={"<|x|>": "300"})
    with pytest.raises(TypeError, match="bytes"):
        Tokenizer({**tokens, "ab": 256})
    with pytest.raises(ValueError, match="gpt-2"):
        Tokenizer(tokens, pattern="gpt-2")
    with pytest.raises(ValueError, match="regular expression"):
        Tokenizer(tokens, pattern="(unclosed")
    with pytest.raises(ValueError, match="merge 0"):
        Tokenizer(tokens, merges=[(97, 98)])


def test_two_names_of_a_special_id(tmp_path) -> None:
    tokens = {bytes([i]): i for i in range(256)}
    tokenizer = Tokenizer(tokens, special_tokens={"<|z|>": 300, "<|a|>": 300})
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert each.encode("<|a|>b<|z|>", allowed_special="all") == [300, 98, 300]
        assert each.decode([300]) == "<|z|>"
        assert each.n_vocab == 301


class TestChar:
    def test_round_trip(self, tmp_path) -> None:
        tokenizer = CharTokenizer.train(CORPUS + "\ud800")
        ids = tokenizer.encode(CORPUS)
        assert tokenizer.decode(ids) == CORPUS
        assert tokenizer.encode_numpy(CORPUS).dtype == np.uint32
        assert max(ids) < tokenizer.n_vocab == len(set(CORPUS)) + 1
        assert tokenizer.eot_token is None
        assert tokenizer.special_tokens == {}
        assert "".join(tokenizer.stream_decode(ids)) == CORPUS
        decoder = tokenizer.stream_decoder()
        assert "".join(decoder.push(id) for id in ids) + decoder.finish() == CORPUS
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert isinstance(loaded, CharTokenizer)
        assert loaded.characters == tokenizer.characters
        assert pickle.loads(pickle.dumps(tokenizer)).encode(CORPUS) == ids

    def test_ids_are_ordered_by_code_point(self) -> None:
        tokenizer = CharTokenizer.train("hello é中")
        assert tokenizer.decode(range(tokenizer.n_vocab)) == "".join(sorted(set("hello é中")))

    def test_errors(self) -> None:
        tokenizer = CharTokenizer.train("abc")
        for text in ("abz", "ab中", "ab\U0010ffff"):
            with pytest.raises(ValueError, match="position 2"):
                tokenizer.encode(text)
        for bad in (3, -1, 2**40):
            with pytest.raises(KeyError):
                tokenizer.decode([bad])
        with pytest.raises(TypeError):
            tokenizer.decode([1.5])
        with pytest.raises(TypeError):
            tokenizer.encode(b"abc")
        with pytest.raises(ValueError, match="no characters"):
            CharTokenizer.train("")
        with pytest.raises(ValueError, match="special"):
            tokenizer.encode("abc", allowed_special={"<|x|>"})


def test_fork_while_other_threads_encode() -> None:
    # Run apart: the child must be able to encode although threads of its parent held workers when it was made.
    code = """
import os, threading
from fastgpt.tokenizer import Tokenizer
tokenizer = Tokenizer({bytes([i]): i for i in range(256)} | {b"ab": 256})
text = "ab cab " * 20_000
expected = tokenizer.encode_ordinary(text)
stop = threading.Event()
def work():
    while not stop.is_set():
        tokenizer.encode_ordinary_numpy(text)
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
codes = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        same = tokenizer.encode_ordinary(text) == expected
        same = same and tokenizer.encode_ordinary_batch([text * 20] * 2, num_threads=2) == [expected * 20] * 2
        os._exit(0 if same else 1)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads: thread.join()
raise SystemExit(any(codes))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False, timeout=120).returncode == 0


def test_caches_are_bounded(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):  # far more distinct words of every length than there is room for, most with many ids
        words = rng.integers(97, 123, size=(40_000, 40), dtype=np.uint8).tobytes().decode()
        lengths = rng.integers(1, 40, size=40_000)
        text = " ".join(words[40 * i : 40 * i + n] for i, n in enumerate(lengths))
        ids = tokenizer.encode_ordinary_numpy(text)
        assert tokenizer.decode(ids) == text
        assert np.array_equal(tokenizer.encode_ordinary_numpy(text), ids)
    workers = 9  # of this test and of those before, which used threads
    assert tokenizer._bpe.cache_bytes() <= workers * (21 << 20)
