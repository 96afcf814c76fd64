#!/usr/bin/env python3
"""Writes unicode_tables.h: the class of every code point, as the pre-tokenizers need it.

    python csrc/bpe/generate_unicode_tables.py            # writes unicode_tables.h beside this file
    python csrc/bpe/generate_unicode_tables.py --check    # exits with 1 when the file there is not what this would
    write

A class is one bit of a byte, so that a set of classes is a mask. The general categories come from `unicodedata2` where
it is installed (PyPI has one release a Unicode version) and from the standard library's `unicodedata` otherwise. Which
version counts: the tables must agree with the regular-expression engine of tiktoken (Rust's regex-syntax), whose
version is EXPECTED_VERSION; another one is refused, because unassigned and recent letters would then get other tokens.
White space is the property White_Space, whose 25 code points have not changed since Unicode 6.3 (U+180E is not one of
them), and not str.isspace(), which adds U+001C to U+001F.
"""

import argparse
import sys
from pathlib import Path

EXPECTED_VERSION = "16.0.0"
WHITE_SPACE = {
    0x20,
    0x85,
    0xA0,
    0x1680,
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
    *range(0x09, 0x0E),
    *range(0x2000, 0x200B),
}
BLOCK = 128

# class -> bit; the same names as in unicode.h
OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE = (1 << bit for bit in range(8))


def classify(code_point: int, category: str) -> int:
    """The class of a code point with the given general category."""
    if code_point in (0x0A, 0x0D):
        return NEWLINE
    if code_point in WHITE_SPACE:
        return SPACE
    by_category = {"Lu": UPPER, "Lt": UPPER, "Ll": LOWER, "Lm": LETTER, "Lo": LETTER}
    by_group = {"M": MARK, "N": NUMBER}
    return by_category.get(category) or by_group.get(category[0], OTHER)


def render() -> str:
    """The text of unicode_tables.h."""
    try:
        import unicodedata2 as unicodedata
    except ImportError:
        import unicodedata
    version = unicodedata.unidata_version
    if version != EXPECTED_VERSION:
        sys.exit(
            f"this Python's Unicode data is version {version}, the tables need {EXPECTED_VERSION}: "
            f"pip install unicodedata2=={EXPECTED_VERSION}"
        )
    classes = bytes(classify(cp, unicodedata.category(chr(cp))) for cp in range(0x110000))
    blocks: dict[bytes, int] = {}
    index = [blocks.setdefault(classes[at : at + BLOCK], len(blocks)) for at in range(0, len(classes), BLOCK)]
    if len(blocks) > 256:
        sys.exit(f"{len(blocks)} distinct blocks do not fit into a byte; change BLOCK")

    def table(name: str, values: list[int]) -> list[str]:
        rows = [", ".join(map(str, values[at : at + 32])) + "," for at in range(0, len(values), 32)]
        return [f"inline constexpr uint8_t {name}[{len(values)}] = {{", *("    " + row for row in rows), "};"]

    lines = [
        f"// Classes of the code points, Unicode {version}. Written by generate_unicode_tables.py; do not edit.",
        "// clang-format off",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace fastgpt::bpe {",
        "",
        f'inline constexpr char kUnicodeVersion[] = "{version}";',
        f"inline constexpr uint32_t kUnicodeBlock = {BLOCK};",
        "",
        "// The class of code point c is kUnicodeClasses[kUnicodeIndex[c / kUnicodeBlock] * kUnicodeBlock + c % kUnicodeBlock].",
        *table("kUnicodeIndex", index),
        *table("kUnicodeClasses", [value for block in blocks for value in block]),
        "",
        "}  // namespace fastgpt::bpe",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes csrc/bpe/unicode_tables.h.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the file is out of date")
    arguments = parser.parse_args()
    target = Path(__file__).with_name("unicode_tables.h")
    text = render()
    if arguments.check:
        return int(not target.exists() or target.read_text() != text)
    target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
