"""The scanners of every instruction set against each other and against the regular expressions themselves."""

import functools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import shared

from fastgpt import _bpe
from fastgpt.tokenizer.patterns import PATTERNS, Splitter

# Weighted to what the vector code decides by: runs of white space, apostrophes, digits, lines, cases, slashes.
ASCII = "aabcsStTdmlLvreREABZ   '''\"..,/!-(  \n\n\r\t\x0b\x1c\x7f\x000011239"
WIDE = "\u00e9\u00c9\u4e2d\u01c5\u02b0\u017f\u0301\u0903\u00b2\u2167\x85\xa0\u2028\u3000\U0001f642"


@functools.cache
def isas() -> list[str]:
    """What this machine has."""
    found = ["portable"]
    for isa in ("avx2", "avx512"):
        try:
            _bpe.pretoken_ends(b"a", "gpt2", isa)
        except ValueError:
            continue
        found.append(isa)
    return found


def by_expression(text: str, pattern: str) -> list[int]:
    """The ends in bytes of what the regular expression matches; it must match everything."""
    begins, ends = splitter(pattern).spans(text)
    assert begins.tolist() == [0, *ends.tolist()[:-1]]
    sizes = np.cumsum([len(character.encode()) for character in text])
    return [int(sizes[end - 1]) for end in ends.tolist()]


@functools.cache
def splitter(pattern: str) -> Splitter:
    return Splitter(PATTERNS[pattern])


def check(text: str, pattern: str) -> None:
    expected = by_expression(text, pattern) if text else []
    for isa in isas():
        assert _bpe.pretoken_ends(text.encode(), pattern, isa).tolist() == expected, (isa, text)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet=ASCII, max_size=400))
def test_ascii(pattern: str, text: str) -> None:
    check(text, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=ASCII + WIDE, max_size=200))
def test_mixed(pattern: str, text: str) -> None:
    check(text, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_random_texts(pattern: str) -> None:
    rng = random.Random(1)
    for round in range(150):
        alphabet = rng.sample(ASCII, rng.randint(2, len(ASCII))) + (list(WIDE) if round % 3 == 0 else [])
        check("".join(rng.choices(alphabet, k=rng.choice([63, 64, 65, 128, 700]))), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_runs_of_every_length(pattern: str) -> None:
    # Runs that end before, at and behind the end of a 64-byte window, at the text's end too.
    ascii_kinds = (" ", "\n", "a", "A", "1", "!", "\t", "'", " \n", "!\n", "\n/")
    wide_kinds = (
        "\u00e9",
        "\u0416",
        "\u0416\u0436",
        "\u4e2d",
        "\u3042\u30fc",
        "\u4e2da",
        "\u4e2dA",
        "\u201c",
        "\u3000",
        "\U0001f642",
    )
    for kind in ascii_kinds + wide_kinds:
        for length in [*range(1, 12), *range(55, 72), 127, 128, 129]:
            run = (kind * length)[:length]
            for before, after in (("", ""), ("", "b"), ("a", " c"), ("!", "'s d"), ("!", "'sd"), ("x ", "\n1")):
                check(before + run + after, pattern)


def check_bytes(data: bytes, pattern: str) -> None:
    """Against the portable scanner, for what is too long for the expressions, or not UTF-8."""
    expected = _bpe.pretoken_ends(data, pattern, "portable")
    for isa in isas():
        found = _bpe.pretoken_ends(data, pattern, isa)
        if not np.array_equal(found, expected):
            at = next((int(b) for a, b in zip(found, expected, strict=False) if a != b), len(data))
            raise AssertionError((isa, data[max(at - 100, 0) : at], data[at : at + 40]))


@functools.cache
def every_character() -> bytes:
    """All code points, surrogates too, each between characters of every kind."""
    around = "a{0}b A{0}B{0} \u4e2d{0}\u4e2d{0}a 1{0}2 !{0}! {0}{0}{0} {0}'s '{0}\n{0}\r\n"
    return "".join(map(around.format, map(chr, range(0x110000)))).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_character(pattern: str) -> None:
    check_bytes(every_character(), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_runs_in_every_script(pattern: str) -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text = ""
        for _ in range(rng.randint(1, 8)):
            first, spread = rng.randrange(0x3400 if rng.random() < 0.6 else 0x110000), 1 << rng.randint(0, 9)
            text += "".join(chr(min(first + rng.randrange(spread), 0x10FFFF)) for _ in range(rng.randint(1, 90)))
            text += rng.choice(ASCII + WIDE)
        check_bytes(text.encode("utf-8", "surrogatepass"), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_real_text(pattern: str) -> None:
    text = shared("data/tinyshakespeare.txt").read_text()[:200_000]
    check(text, pattern)
    with open(os.__file__, encoding="utf-8") as file:
        check(file.read(), pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=300)
    | st.lists(st.sampled_from([b" ", b"a", b"'", b"\xc3", b"\xe4\xb8", b"\xff"])).map(b"".join)
)
def test_any_bytes_are_covered_alike(pattern: str, data: bytes) -> None:
    expected = _bpe.pretoken_ends(data, pattern, "portable").tolist()
    assert expected == sorted(set(expected))
    assert (expected or [0])[-1] == len(data)
    check_bytes(data, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=ASCII + WIDE, max_size=120), limit=st.integers(0, 150))
def test_safe_cuts_are_boundaries(pattern: str, text: str, limit: int) -> None:
    data = text.encode()
    cut = _bpe.safe_cut(data, limit)
    assert 0 <= cut <= limit
    whole = _bpe.pretoken_ends(data, pattern, "portable").tolist()
    first = _bpe.pretoken_ends(data[:cut], pattern, "portable").tolist()
    rest = _bpe.pretoken_ends(data[cut:], pattern, "portable").tolist()
    assert first + [cut + end for end in rest] == whole


def test_the_environment_chooses() -> None:
    code = "from fastgpt import _bpe; print(_bpe.isa())"
    wanted = {isa: isa for isa in isas()}
    if "avx512" in wanted:  # what the CPU engine tells apart is one to the tokenizer
        wanted |= dict.fromkeys(("avx512f", "avx512bf16", "avx512amx"), "avx512")
    for isa, used in wanted.items():
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"FASTGPT_CPU_ISA": isa}, capture_output=True, check=True
        )
        assert run.stdout.decode().strip() == used
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTGPT_CPU_ISA": "sse9"}, capture_output=True, check=False
    )
    assert run.returncode != 0
    assert b"sse9" in run.stderr
    with pytest.raises(ValueError, match="neon"):
        _bpe.pretoken_ends(b"a", "gpt2", "neon")
