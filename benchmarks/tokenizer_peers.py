"""The tokenizers that bench_tokenizer.py compares: each loads an encoding from the same vocabulary file.

A peer that is not installed raises ImportError in `load`, and its rows are left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.registry import ENCODINGS

PACKAGES = {
    "fastgpt": "fastgpt-kernels",
    "tiktoken": "tiktoken",
    "gigatoken": "gigatoken",
    "fastokens": "fastokens",
    "toktok": "toktok-rs",
    "tokenizers": "tokenizers",
}
Batch = Callable[[list[str]], Any]


@dataclass
class Peer:
    """One library: how it makes ids; None where it cannot.

    arrays, lists: of a batch, on one thread; threads: of a batch, as arrays, on two; one, one_array: of a text, as a list
    and as an array; decode: ids (a list) to text or bytes; decode_array: the same from a uint32 array.
    """

    lists: Batch
    one: Callable[[str], Any]
    one_array: Callable[[str], Any] | None = None
    arrays: Batch | None = None
    threads: Batch | None = None
    decode: Callable[[Any], Any] | None = None
    decode_array: Callable[[Any], Any] | None = None


def load(name: str, encoding: str, vocab: Path) -> Peer:
    """A library with an encoding; ImportError where it is not installed.

    Args:
        name: one of PACKAGES.
        encoding: one of fastgpt's encodings.
        vocab: the folder of the .tiktoken files.
    """
    parts = ENCODINGS[encoding]
    path = vocab / f"{parts.vocabulary}.tiktoken"
    if name == "fastgpt":
        ours = Tokenizer.from_tiktoken(path, parts.pattern, parts.special_tokens)
        return Peer(
            lists=lambda texts: ours.encode_ordinary_batch(texts, num_threads=1),
            one=ours.encode_ordinary,
            one_array=ours.encode_ordinary_numpy,
            arrays=lambda texts: ours.encode_ordinary_batch_numpy(texts, num_threads=1),
            threads=lambda texts: ours.encode_ordinary_batch_numpy(texts, num_threads=2),
            decode=ours.decode_bytes,
            decode_array=ours.decode_bytes,
        )
    if name == "tiktoken":
        tiktoken = import_module("tiktoken")
        ours = Tokenizer.from_tiktoken(path, parts.pattern, parts.special_tokens)
        theirs = tiktoken.Encoding(
            encoding, pat_str=ours.pattern, mergeable_ranks=ours.tokens, special_tokens=parts.special_tokens
        )
        return Peer(
            lists=lambda texts: [theirs.encode_ordinary(text) for text in texts],
            one=theirs.encode_ordinary,
            one_array=lambda text: theirs.encode_to_numpy(text, disallowed_special=()),
            arrays=lambda texts: [theirs.encode_to_numpy(text, disallowed_special=()) for text in texts],
            threads=lambda texts: theirs.encode_ordinary_batch(texts, num_threads=2),
            decode=theirs.decode_bytes,
        )
    if name == "gigatoken":
        giga = import_module("gigatoken").Tokenizer.from_tiktoken(path)
        return Peer(
            lists=lambda texts: giga.encode_batch_list(texts, parallel=False),
            one=lambda text: giga.encode(text).tolist(),  # faster than a batch of one to a list
            one_array=giga.encode,
            arrays=lambda texts: giga.encode_batch(texts, parallel=False),
            threads=lambda texts: giga.encode_batch(texts, parallel=True),
            decode=giga.decode,
            decode_array=giga.decode,
        )
    if name == "toktok":
        tok = import_module("toktok")._encoding(encoding)
        return Peer(
            tok.encode_batch,
            tok.encode_ordinary,
            one_array=tok.encode_to_numpy,
            arrays=tok.encode_batch_to_numpy,
            decode=tok.decode_bytes,
        )
    if name not in ("fastokens", "tokenizers"):
        raise ImportError(f"{name} encodes nothing here")
    module = import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder) / "tokenizer.json")
        # cl100k's pattern as tokenizer.json files have it, which these know by its text; it differs at a text's end only.
        pattern = "llama3" if parts.pattern == "cl100k_base" else parts.pattern
        Tokenizer.from_tiktoken(path, pattern).save_huggingface(exported)
        if name == "fastokens":
            fast = module.Tokenizer.from_file(exported)
            return Peer(
                lists=lambda texts: [fast.encode(text).ids for text in texts],  # encode alone makes no list
                one=lambda text: fast.encode(text).ids,
                arrays=fast.encode_batch_flat,
                threads=fast.encode_batch_flat,
                decode=fast.decode,
            )
        other = module.Tokenizer.from_file(exported)
        return Peer(
            lists=lambda texts: [encoded.ids for encoded in other.encode_batch(texts)],
            one=lambda text: other.encode(text).ids,
            decode=other.decode,
        )


def train(name: str, path: Path, vocab_size: int) -> int:
    """Trains on a file with GPT-2's pattern on two threads; returns how many tokens came out.

    RAYON_NUM_THREADS says how many threads the others use. ImportError where the library is not there or trains nothing.
    """
    if name == "fastgpt":
        return Tokenizer.train([path], vocab_size, pattern="gpt2", special_tokens=(), num_threads=2).n_vocab
    if name == "gigatoken":
        return len(import_module("gigatoken").train_bpe(path, vocab_size, [])[0])
    raise ImportError(f"{name} is not compared in training")


def package_versions() -> dict[str, str | None]:
    """The versions of what is compared; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            versions[name] = None
    return versions
