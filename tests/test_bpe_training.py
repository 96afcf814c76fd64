"""Training and merging against their definitions, written here without any cleverness."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import shared

from fastgpt.tokenizer import Tokenizer


def join(ids: list[int], pair: tuple[int, int], id: int) -> list[int]:
    """The ids with every occurrence of a pair replaced, from left to right."""
    out, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train_by_definition(pretokens: list[bytes], merges: int, min_frequency: int = 1) -> list[bytes]:
    """The tokens after 255 of minbpe's training; ties to the smallest pair."""
    words = [list(word) for word in pretokens]
    tokens = [bytes([i]) for i in range(256)]
    for id in range(256, 256 + merges):
        counts: Counter[tuple[int, int]] = Counter()
        for word in words:
            counts.update(itertools.pairwise(word))
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        if counts[pair] < min_frequency:
            break
        words = [join(word, pair, id) for word in words]
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return tokens[256:]


def encode_by_definition(piece: bytes, merges: list[tuple[int, int]]) -> list[int]:
    """minbpe's encoding of one pre-token."""
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = list(piece)
    while len(ids) > 1:
        pair = min(itertools.pairwise(ids), key=lambda p: rank.get(p, len(merges)))
        if pair not in rank:
            break
        ids = join(ids, pair, 256 + rank[pair])
    return ids


def learnt(tokenizer: Tokenizer) -> list[bytes]:
    """The tokens after the bytes, by id."""
    return [token for token, id in sorted(tokenizer.tokens.items(), key=lambda item: item[1]) if id >= 256]


@settings(max_examples=150)
@given(
    texts=st.lists(st.text(alphabet="aab \n1é", max_size=60), min_size=1, max_size=4),
    merges=st.integers(0, 40),
    min_frequency=st.integers(1, 3),
)
def test_training_is_the_definition(texts: list[str], merges: int, min_frequency: int) -> None:
    tokenizer = Tokenizer.train(texts, 256 + merges, special_tokens=(), min_frequency=min_frequency)
    pretokens = [piece.encode() for text in texts for piece in tokenizer.pretokens(text)]
    assert learnt(tokenizer) == train_by_definition(pretokens, merges, min_frequency)


def test_training_on_real_text_is_the_definition() -> None:
    text = shared("data/tinyshakespeare.txt").read_text()[:10_000]
    tokenizer = Tokenizer.train([text], 256 + 150, special_tokens=())
    assert learnt(tokenizer) == train_by_definition([piece.encode() for piece in tokenizer.pretokens(text)], 150)


def test_encoding_is_the_definition() -> None:
    # Ids of a trained vocabulary are ranks; joining by content must give what the list of pairs gives.
    rng = random.Random(3)
    words = ["".join(rng.choices("aabc", k=rng.randint(1, 12))) for _ in range(300)]
    tokenizer = Tokenizer.train([" ".join(words)], 400, special_tokens=())
    by_bytes = tokenizer.tokens
    merges = []
    for token in learnt(tokenizer):  # the pair of a token: its own encoding with lower ranks only
        below = encode_by_definition(token, merges)
        assert len(below) == 2
        merges.append((below[0], below[1]))
    listed = Tokenizer(by_bytes, merges=merges, whole_first=False)
    for _ in range(300):
        piece = "".join(rng.choices("aabcd", k=rng.randint(1, 90)))
        expected = encode_by_definition(piece.encode(), merges)
        assert tokenizer.encode(piece) == expected
        assert listed.encode(piece) == expected


def test_any_number_of_threads_and_order_gives_the_same(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=30_000)) for _ in range(6)]  # several parts for each thread
    first = learnt(Tokenizer.train(texts, 700, num_threads=1))
    assert len(first) == 443
    assert learnt(Tokenizer.train(texts[::-1], 700, num_threads=2)) == first
    assert learnt(Tokenizer.train(iter(texts), 700, num_threads=5)) == first
    paths = []
    for i, text in enumerate(texts):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_text(text)
    assert learnt(Tokenizer.train(paths, 700, num_threads=2)) == first


def test_files_in_parts_give_what_the_text_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt.tokenizer.texts._BLOCK_BYTES", 20_000)
    text = shared("data/tinyshakespeare.txt").read_text()[:200_000] + "中文字符é  \n\n  x" * 500
    (tmp_path / "text.txt").write_text(text)
    for pattern in ("gpt2", "cl100k_base", "o200k_base", r"\S+|\s+"):
        whole = Tokenizer.train(text, 500, pattern=pattern)
        assert learnt(Tokenizer.train(tmp_path / "text.txt", 500, pattern=pattern)) == learnt(whole)


def test_custom_pattern_is_the_definition() -> None:
    text = "ab1 cd22 abcd é1é1 " * 30
    tokenizer = Tokenizer.train([text], 290, pattern=r"[a-zé]+|\d", special_tokens=())
    pretokens = [piece.encode() for piece in tokenizer.pretokens(text)]
    assert " " not in "".join(tokenizer.pretokens(text))
    assert learnt(tokenizer) == train_by_definition(pretokens, 34)
    assert tokenizer.decode(tokenizer.encode("ab1 cd")) == "ab1cd"  # what does not match is dropped, as in tiktoken


def test_special_tokens_are_left_out_and_last() -> None:
    text = "<|sep|>abc" * 50
    tokenizer = Tokenizer.train([text], 300, special_tokens=("<|sep|>", "<|end|>"))
    assert tokenizer.special_tokens == {"<|sep|>": 258, "<|end|>": 259}
    assert learnt(tokenizer) == [b"ab", b"abc"]
    assert tokenizer.n_vocab == 260


def test_min_frequency_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    text = " ".join(f"w{i}" for i in range(4000))
    tokenizer = Tokenizer.train(
        [text], 1000, min_frequency=11, progress=lambda done, wanted: seen.append((done, wanted))
    )
    assert 256 < tokenizer.n_vocab < 1000
    assert seen
    assert all(wanted == 743 and 0 < done <= wanted for done, wanted in seen)

    class Stop(Exception):
        pass

    def stop(done: int, wanted: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        Tokenizer.train([text], 1000, progress=stop)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: got 256, expected at least 257"):
        Tokenizer.train(["abc"], 256)
    with pytest.raises(TypeError, match="vocab_size"):
        Tokenizer.train(["abc"], 300.0)
    with pytest.raises(ValueError, match="min_frequency"):
        Tokenizer.train(["abc"], 300, min_frequency=0)
    with pytest.raises(TypeError, match="texts"):
        Tokenizer.train([b"abc"], 300)
    with pytest.raises(TypeError, match="special_tokens"):
        Tokenizer.train(["abc"], 300, special_tokens="<|x|>")
    with pytest.raises(ValueError, match="pattern"):
        Tokenizer.train(["abc"], 300, pattern="gpt5")
    (tmp_path / "binary").write_bytes(b"abc " * 1000 + b"\xff")
    with pytest.raises(ValueError, match=r"binary: not UTF-8 at byte 4000"):
        Tokenizer.train([tmp_path / "binary"], 300)
    with pytest.raises(FileNotFoundError):
        Tokenizer.train([tmp_path / "missing"], 300)


def test_nothing_to_train_on_gives_bytes_only() -> None:
    tokenizer = Tokenizer.train([], 300)
    assert tokenizer.n_vocab == 257
    assert tokenizer.encode("é") == [0xC3, 0xA9]
