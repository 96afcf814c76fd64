"""Corpora: the standard library, files and folders of the user, and tiny shakespeare with its checks."""

import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pytest
from paths import shared

from fastgpt.data import corpora
from fastgpt.data.corpora import held_out, load_corpus, read_text, shakespeare_file
from fastgpt.errors import UserError


def test_stdlib_is_deterministic_and_split_by_whole_files():
    first, again = load_corpus("stdlib", 0.1), load_corpus("stdlib", 0.1)
    assert first == again
    assert not set(first.train) & set(first.val)
    share = sum(map(len, first.val)) / sum(map(len, (*first.train, *first.val)))
    assert 0.03 < share < 0.25
    text = "".join(first.train)
    assert "def namedtuple(" in text + "".join(first.val)
    assert len(text) > 1_000_000


def test_stdlib_has_no_tests_and_nothing_of_this_machine():
    for path in corpora._stdlib_files(Path(__import__("sysconfig").get_path("stdlib"))):
        assert not {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"} & set(path.parts[-4:])
        assert not path.name.startswith("_sysconfigdata")


def test_a_text_is_cut_once(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("0123456789" * 10, encoding="utf-8")
    corpus = load_corpus(str(file), 0.1)
    assert corpus.name == "a"
    assert (corpus.train, corpus.val) == (["0123456789" * 9], ["0123456789"])


def test_shakespeare_split_is_nanogpts():
    corpus = load_corpus(str(shared("data/tinyshakespeare.txt")), 0.1)
    assert (len(corpus.train[0]), len(corpus.val[0])) == (1_003_854, 111_540)


def test_bom_and_line_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(file) == "one\r\ntwo\n"


def test_a_folder_with_many_files_holds_whole_files_out(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text of file {number}\n")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt").write_text("deep\n")
    corpus = load_corpus(str(tmp_path), 0.25)
    assert len(corpus.train) + len(corpus.val) == 41
    texts = {f"{n}.txt": f"text of file {n}\n" for n in range(40)} | {"sub/deep.txt": "deep\n"}
    assert corpus.val == [texts[name] for name in sorted(texts) if held_out(name, 0.25)]
    assert 0 < len(corpus.val) < len(corpus.train)
    assert "secret" not in "".join(corpus.train + corpus.val)
    assert any("picture.png" in note for note in corpus.notes)


def test_a_folder_with_few_files_is_cut_once(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 50)
    (tmp_path / "a.txt").write_text("a" * 49)
    corpus = load_corpus(str(tmp_path), 0.1)
    assert corpus.train + corpus.val == ["a" * 49 + "\n" + "b" * 40, "b" * 10]


def test_copies_are_read_once(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text of file {number // 2}\n")
    corpus = load_corpus(str(tmp_path), 0.25)
    assert sorted(corpus.train + corpus.val) == sorted({f"text of file {n}\n" for n in range(20)})
    assert corpus.notes == ["20 files left out as copies of others"]


def test_held_out_share():
    share = sum(held_out(f"package/module_{n}.py", 0.1) for n in range(5000)) / 5000
    assert 0.08 < share < 0.12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", "binary"),
        (b"abc\xff\xfedef", "not UTF-8"),
        (b"a", "too short"),
    ],
)
def test_bad_files(tmp_path, content, words):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(file), 0.1)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_corpus(str(tmp_path / "no.txt"), 0.1)
    with pytest.raises(UserError, match="holds no UTF-8 text"):
        load_corpus(str(tmp_path), 0.1)
    (tmp_path / "only.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"1 files left out; the first: .*only\.bin is binary"):
        load_corpus(str(tmp_path), 0.1)


class _Server(http.server.ThreadingHTTPServer):
    """Serves one answer to every GET, on a free port."""

    def __init__(self, answer: bytes) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/input.txt"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def test_download_keeps_the_right_text_and_never_asks_again(cache):
    data = shared("data/tinyshakespeare.txt").read_bytes()
    server = _Server(data)
    path = shakespeare_file(server.url)
    server.shutdown()
    assert path.read_bytes() == data
    assert [item.name for item in cache.iterdir()] == ["tinyshakespeare.txt"]
    assert shakespeare_file(server.url) == path  # the server is gone: this is the cache


def test_download_of_another_text_keeps_nothing(cache):
    server = _Server(b"<html>please log in</html>")
    with pytest.raises(UserError, match=r"is not tiny shakespeare.*nothing was kept"):
        shakespeare_file(server.url)
    server.shutdown()
    assert not cache.exists()


def test_no_network_says_what_to_do(cache):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/input.txt"
        with pytest.raises(UserError) as caught:
            shakespeare_file(url)
    message = str(caught.value)
    for words in (url, str(cache / "tinyshakespeare.txt"), "--data FILE", "without a network"):
        assert words in message
    assert not cache.exists()


def test_a_changed_cache_is_noticed(cache):
    cache.mkdir()
    (cache / "tinyshakespeare.txt").write_text("First Citizen")
    with pytest.raises(UserError, match="is not tiny shakespeare"):
        shakespeare_file()


def test_a_file_put_by_hand_is_taken(cache):
    cache.mkdir()
    data = shared("data/tinyshakespeare.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == corpora.SHAKESPEARE_SHA256
    (cache / "tinyshakespeare.txt").write_bytes(data)
    assert load_corpus("shakespeare", 0.1).name == "shakespeare"
