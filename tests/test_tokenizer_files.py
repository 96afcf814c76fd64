"""Other people's vocabulary files, encodings by name, and encoding whole files."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from paths import shared

import fastgpt
from fastgpt.tokenizer import PATTERNS, Tokenizer, get_encoding, list_encoding_names, registry

TEXT = "The quick brown fox doesn't jump over 12345 lazy dogs!  \n\n\tGröße 中文 🙂\r\n" * 5


@pytest.fixture
def vocabulary() -> Path:
    return shared("data/vocab")


@pytest.fixture(params=["gpt2", "cl100k_base", "o200k_base"])
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train([TEXT], 380, pattern=request.param)


class TestTiktoken:
    def test_round_trip(self, trained: Tokenizer, tmp_path: Path) -> None:
        trained.save_tiktoken(tmp_path / "x.tiktoken")
        loaded = Tokenizer.from_tiktoken(tmp_path / "x.tiktoken", trained.pattern, trained.special_tokens)
        assert loaded.tokens == trained.tokens
        assert loaded.name == "x"
        assert loaded.encode(TEXT) == trained.encode(TEXT)

    def test_writes_the_same_bytes(self, vocabulary: Path, tmp_path: Path) -> None:
        path = vocabulary / "cl100k_base.tiktoken"
        Tokenizer.from_tiktoken(path, "cl100k_base").save_tiktoken(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"\n\n", "it is empty"),
            (b"YQ==\n", "line 1"),
            (b"YQ== 0\nYg== x\n", "line 2"),
            (b"YQ== 0\n*** 1\n", "line 2"),
            (b"YQ== 0\nYQ== 1\n", "twice"),
            (b"YQ== 0\nYg== 0\n", "twice"),
            (b"YQ== 0\n", "single byte"),
            (b"<html>not found</html>", "line 1"),
        ],
    )
    def test_damaged(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = tmp_path / "bad.tiktoken"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as error:
            Tokenizer.from_tiktoken(path, "gpt2")
        assert str(path) in str(error.value)

    def test_a_list_of_merges_cannot_be_written(self, tmp_path: Path) -> None:
        tokens = {bytes([i]): i for i in range(256)} | {b"ab": 256}
        with pytest.raises(ValueError, match="merges"):
            Tokenizer(tokens, merges=[(97, 98)]).save_tiktoken(tmp_path / "x")


class TestGetEncoding:
    @pytest.fixture(autouse=True)
    def _no_network_and_no_caches(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def offline(url: str, timeout: float) -> None:
            raise OSError("no network here")

        monkeypatch.setattr("urllib.request.urlopen", offline)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("FASTGPT_VOCAB_DIR", raising=False)
        get_encoding.cache_clear()

    @pytest.mark.parametrize("name", ["gpt2", "r50k_base", "cl100k_base", "o200k_base", "o200k_harmony"])
    def test_from_a_folder(self, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv("FASTGPT_VOCAB_DIR", str(vocabulary))
        tokenizer = fastgpt.get_encoding(name)
        expected = {"gpt2": [31373, 995], "r50k_base": [31373, 995], "cl100k_base": [15339, 1917]}
        assert tokenizer.encode("hello world") == expected.get(name, [24912, 2375])
        assert tokenizer.name == name
        assert tokenizer is get_encoding(name)

    def test_from_the_caches(self, vocabulary: Path, tmp_path: Path) -> None:
        data = (vocabulary / "r50k_base.tiktoken").read_bytes()
        url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
        (tmp_path / "tiktoken").mkdir()
        place = tmp_path / "tiktoken" / hashlib.sha1(url.encode()).hexdigest()
        place.write_bytes(data)
        assert get_encoding("r50k_base").n_vocab == 50257
        place.write_bytes(data[:-1])  # a damaged cache is passed over
        get_encoding.cache_clear()
        with pytest.raises(FileNotFoundError):
            get_encoding("r50k_base")
        (tmp_path / "cache/fastgpt/vocab").mkdir(parents=True)
        (tmp_path / "cache/fastgpt/vocab/r50k_base.tiktoken").write_bytes(data)
        assert get_encoding("r50k_base").n_vocab == 50257

    def test_download_is_checked_before_it_is_kept(
        self, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        own = tmp_path / "cache/fastgpt/vocab/r50k_base.tiktoken"
        for content in (b"", b"<html>an error page</html>"):
            monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout, served=content: io.BytesIO(served))
            with pytest.raises(FileNotFoundError, match="checksum"):
                get_encoding("r50k_base")
            assert not own.exists()
        data = (vocabulary / "r50k_base.tiktoken").read_bytes()
        monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(data))
        assert get_encoding("r50k_base").n_vocab == 50257
        assert own.read_bytes() == data

    def test_offline_says_what_to_do(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"(?s)no network here.*p50k_base\.tiktoken.*FASTGPT_VOCAB_DIR"):
            get_encoding("p50k_base")

    def test_wrong_file_in_the_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FASTGPT_VOCAB_DIR", str(tmp_path))
        (tmp_path / "cl100k_base.tiktoken").write_bytes(b"")
        with pytest.raises(ValueError, match="SHA-256") as error:
            get_encoding("cl100k_base")
        assert str(tmp_path) in str(error.value)

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="cl100k_base"):
            get_encoding("gpt5")

    def test_definitions_are_tiktokens(self) -> None:
        public = pytest.importorskip("tiktoken_ext.openai_public")
        assert set(list_encoding_names()) <= set(public.ENCODING_CONSTRUCTORS)
        with pytest.MonkeyPatch.context() as patch:
            hashes: list[str] = []
            patch.setattr(public, "load_tiktoken_bpe", lambda url, expected_hash: hashes.append(expected_hash) or {})
            patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
            for name, encoding in registry.ENCODINGS.items():
                hashes.clear()
                theirs = public.ENCODING_CONSTRUCTORS[name]()
                assert PATTERNS[encoding.pattern] == theirs["pat_str"]
                assert encoding.special_tokens == theirs["special_tokens"]
                if hashes:
                    assert hashes == [registry._SHA256[encoding.vocabulary]]


class TestHuggingFace:
    def test_round_trip(self, trained: Tokenizer, tmp_path: Path) -> None:
        trained.save_huggingface(tmp_path / "tokenizer.json")
        loaded = Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
        assert loaded.tokens == trained.tokens
        assert loaded.special_tokens == trained.special_tokens
        assert loaded.encode(TEXT) == trained.encode(TEXT)
        assert Tokenizer.from_huggingface(tmp_path).encode(TEXT) == trained.encode(TEXT)
        loaded.save(tmp_path / "own.json")
        assert Tokenizer.load(tmp_path / "own.json").encode(TEXT) == trained.encode(TEXT)
        loaded.save_huggingface(tmp_path / "again.json")
        first, again = (json.loads((tmp_path / name).read_bytes()) for name in ("tokenizer.json", "again.json"))
        assert first["model"] == again["model"]

    def test_their_library_gives_the_same_ids(self, trained: Tokenizer, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        trained.save_huggingface(tmp_path / "tokenizer.json")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        text = TEXT + "it's THE <|endoftext|>end \n \n  "
        assert theirs.encode(text).ids == trained.encode(text, allowed_special="all")

    def test_what_they_trained(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        theirs = tokenizers.ByteLevelBPETokenizer()
        theirs.train_from_iterator([TEXT], vocab_size=400, min_frequency=1, special_tokens=["<|endoftext|>"])
        theirs.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "parts").mkdir()
        theirs.save_model(str(tmp_path / "parts"))
        for path in (tmp_path / "tokenizer.json", tmp_path / "parts"):
            ours = Tokenizer.from_huggingface(path)
            assert ours.eot_token == 0
            assert ours.encode(TEXT + "foxes' 99") == theirs.encode(TEXT + "foxes' 99").ids

    def test_merges_count_and_not_contents(self, tmp_path: Path) -> None:
        # "abc" may only be made of "ab" and "c": after b + c there is no way to it.
        tokens = {bytes([i]): i for i in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258}
        tokenizer = Tokenizer(tokens, merges=[(98, 99), (97, 98), (257, 99)], whole_first=False)
        assert tokenizer.encode("abc") == [97, 256]
        tokenizer.save_huggingface(tmp_path / "tokenizer.json")
        assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").encode("abc") == [97, 256]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"normalizer": {"type": "NFC"}}, "normalizer"),
            ({"pre_tokenizer": None}, "pre-tokenizer"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
            ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
            ({"model": {"type": "Unigram"}}, "Unigram"),
            ({"model": {"type": "BPE", "vocab": {"中": 0}, "merges": []}}, "byte alphabet"),
            ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "merge 0"),
            ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "single byte"),
            ({"model": {"type": "BPE", "unk_token": "[UNK]"}}, "unk_token"),
            ({"model": None}, "not a byte-level"),
        ],
    )
    def test_refused(self, trained: Tokenizer, tmp_path: Path, change: dict, reason: str) -> None:
        path = tmp_path / "tokenizer.json"
        trained.save_huggingface(path)
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
        with pytest.raises(ValueError, match=reason) as error:
            Tokenizer.from_huggingface(path)
        assert str(path) in str(error.value)

    def test_no_json(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(b"")
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
        with pytest.raises(FileNotFoundError):
            Tokenizer.from_huggingface(tmp_path / "none.json")


class TestEncodeFile:
    @pytest.mark.parametrize(("vocab_size", "dtype"), [(380, "<u2"), (None, "<u4")])
    def test_is_the_text_s_ids(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int | None, dtype: str
    ) -> None:
        monkeypatch.setattr("fastgpt.tokenizer.texts._BLOCK_BYTES", 500)
        (tmp_path / "text").write_text(TEXT * 20, newline="")
        tokenizer = Tokenizer.train([TEXT], 380)
        if vocab_size is None:
            tokenizer = Tokenizer(tokenizer.tokens, special_tokens={"<|far|>": 70_000})
        seen: list[tuple[int, int]] = []
        count = tokenizer.encode_file(
            tmp_path / "text", tmp_path / "ids", progress=lambda done, total: seen.append((done, total))
        )
        expected = tokenizer.encode_ordinary(TEXT * 20)
        assert np.fromfile(tmp_path / "ids", dtype).tolist() == expected
        assert count == len(expected)
        size = (tmp_path / "text").stat().st_size
        assert len(seen) > 2
        assert seen[-1] == (size, size)

    def test_empty_and_bad_files(self, tmp_path: Path) -> None:
        tokenizer = Tokenizer.train([TEXT], 300)
        (tmp_path / "empty").write_bytes(b"")
        assert tokenizer.encode_file(tmp_path / "empty", tmp_path / "ids") == 0
        (tmp_path / "bad").write_bytes(b"abc\xff")
        (tmp_path / "ids").write_bytes(b"kept")
        with pytest.raises(ValueError, match="not UTF-8"):
            tokenizer.encode_file(tmp_path / "bad", tmp_path / "ids")
        assert (tmp_path / "ids").read_bytes() == b"kept"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty", "ids"]


@pytest.mark.parametrize("pattern", ["gpt2", "o200k_base", r"\w+|\W+"])
def test_truncate(pattern: str) -> None:
    tokenizer = Tokenizer.train([TEXT], 300, pattern=pattern)
    text = TEXT[:200]
    total = tokenizer.count(text)
    for limit in range(total + 2):
        prefix = tokenizer.truncate(text, limit)
        assert text.startswith(prefix)
        assert tokenizer.count(prefix) <= limit
        # No longer one was possible by whole tokens.
        covered = tokenizer.decode_bytes(tokenizer.encode(text)[:limit]).decode("utf-8", "ignore")
        assert len(prefix) <= len(covered)
        assert prefix == covered or tokenizer.count(covered) > limit
    assert tokenizer.truncate(text, total) == text
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer.truncate(text, -1)
