"""Tokenizers: byte-level BPE in C++ (`Tokenizer`) and one token a character (`CharTokenizer`).

Nothing here imports torch. The C++ is in csrc/bpe, its module is fastgpt._bpe.
"""

from fastgpt.tokenizer.bpe import END_OF_TEXT, Tokenizer, load_tokenizer
from fastgpt.tokenizer.char import CharTokenizer
from fastgpt.tokenizer.patterns import PATTERNS
from fastgpt.tokenizer.registry import get_encoding, list_encoding_names
from fastgpt.tokenizer.stream import StreamDecoder

__all__ = [
    "END_OF_TEXT",
    "PATTERNS",
    "CharTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "get_encoding",
    "list_encoding_names",
    "load_tokenizer",
]
