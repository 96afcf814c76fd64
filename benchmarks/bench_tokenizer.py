"""The tokenizer against every other that is installed: tiktoken, gigatoken, fastokens, toktok, Hugging Face's
tokenizers.

    python -m benchmarks.bench_tokenizer --corpora DIR --vocab DIR [--encoding cl100k_base] [--corpus en] [--mb 20]
    [--out benchmarks/results]

DIR of the corpora holds NAME_bench.txt, documents one after the other, and NAME_bench.off.npy, their byte offsets
(int64, documents + 1); DIR of the vocabularies the .tiktoken files. Everything runs pinned to one core, on one thread
each. Warm rows: all in one process, in turns, the median of the rounds. Cold rows: a fresh process each, its first
batch after a call with one word. Times are CPU times of the process, which a busy machine disturbs less than the clock,
though its caches are still shared; the load average goes into the result. Ids are compared with tiktoken's (of every
document) before anything is timed; who differs is marked and timed all the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.registry import ENCODINGS

ROUNDS = 5
PACKAGES = {
    "fastgpt": "fastgpt-kernels",
    "tiktoken": "tiktoken",
    "gigatoken": "gigatoken",
    "fastokens": "fastokens",
    "toktok": "toktok-rs",
    "tokenizers": "tokenizers",
}
Batch = Callable[[list[str]], Any]


class Peer:
    """One library: how it makes arrays, lists and single texts' ids, and how it decodes; None where it cannot."""

    def __init__(
        self, arrays: Batch | None, lists: Batch, one: Callable[[str], Any], decode: Callable[[Any], Any] | None
    ):
        self.arrays, self.lists, self.one, self.decode = arrays, lists, one, decode


def load(name: str, encoding: str, vocab: Path) -> Peer:
    """A library with an encoding; ImportError where it is not installed."""
    parts = ENCODINGS[encoding]
    path = vocab / f"{parts.vocabulary}.tiktoken"
    if name == "fastgpt":
        ours = Tokenizer.from_tiktoken(path, parts.pattern, parts.special_tokens)
        return Peer(
            lambda texts: ours.encode_ordinary_batch_numpy(texts, num_threads=1),
            lambda texts: ours.encode_ordinary_batch(texts, num_threads=1),
            ours.encode_ordinary,
            ours.decode_bytes,
        )
    if name == "tiktoken":
        import tiktoken

        ours = Tokenizer.from_tiktoken(path, parts.pattern, parts.special_tokens)
        theirs = tiktoken.Encoding(
            encoding, pat_str=ours.pattern, mergeable_ranks=ours.tokens, special_tokens=parts.special_tokens
        )
        return Peer(
            lambda texts: [theirs.encode_to_numpy(text, disallowed_special=()) for text in texts],
            lambda texts: [theirs.encode_ordinary(text) for text in texts],
            theirs.encode_ordinary,
            theirs.decode_bytes,
        )
    if name == "gigatoken":
        giga = import_module("gigatoken").Tokenizer.from_tiktoken(path)
        return Peer(
            lambda texts: giga.encode_batch(texts, parallel=False),
            lambda texts: giga.encode_batch_list(texts, parallel=False),
            giga.encode,
            giga.decode,
        )
    if name == "toktok":
        tok = import_module("toktok")._encoding(encoding)
        return Peer(tok.encode_batch_to_numpy, tok.encode_batch, tok.encode_ordinary, tok.decode_bytes)
    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder) / "tokenizer.json")
        if name == "fastokens":
            Tokenizer.from_tiktoken(path, parts.pattern).save_huggingface(exported)
            fast = import_module("fastokens").Tokenizer.from_file(exported)
            return Peer(fast.encode_batch_flat, lambda texts: [fast.encode(t) for t in texts], fast.encode, fast.decode)
        if name == "tokenizers":
            Tokenizer.from_tiktoken(path, parts.pattern).save_huggingface(exported)
            hf = import_module("tokenizers").Tokenizer.from_file(exported)
            return Peer(
                None, lambda texts: [e.ids for e in hf.encode_batch(texts)], lambda text: hf.encode(text).ids, hf.decode
            )
    raise ImportError(name)


def read_documents(corpora: Path, corpus: str, mb: float) -> list[str]:
    """The first documents of a corpus, about mb megabytes."""
    data = (corpora / f"{corpus}_bench.txt").read_bytes()
    offsets = np.load(corpora / f"{corpus}_bench.off.npy")
    count = int(np.searchsorted(offsets, mb * 1e6))
    return [data[a:b].decode() for a, b in itertools.pairwise(offsets[: count + 1])]


def same_ids(peer: Peer, documents: list[str], expected: list[list[int]]) -> bool:
    """Whether every document gets tiktoken's ids."""
    got = peer.lists(documents)
    return all(list(getattr(ids, "ids", ids)) == want for ids, want in zip(got, expected, strict=True))


def cpu_s(call: Callable[[], Any]) -> float:
    """CPU seconds of a call, of all threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def cold(arguments: argparse.Namespace) -> None:
    """In a fresh process: prints the CPU seconds of the first call and of the first batch."""
    documents = read_documents(arguments.corpora, arguments.corpus, arguments.mb)
    for text in documents:
        text.encode()
    peer = load(arguments.cold, arguments.encoding, arguments.vocab)
    first = cpu_s(lambda: peer.one("word"))
    print(json.dumps({"first_call_ms": first * 1e3, "s": cpu_s(lambda: (peer.arrays or peer.lists)(documents))}))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one encoding and corpus."""
    documents = read_documents(arguments.corpora, arguments.corpus, arguments.mb)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    peers: dict[str, Peer] = {}
    for name in PACKAGES:
        try:
            peers[name] = load(name, arguments.encoding, arguments.vocab)
        except (ImportError, ValueError, KeyError) as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    tiktoken_ids = peers["tiktoken"].lists(documents)
    cases: list[dict[str, Any]] = []
    exact = {name: same_ids(peer, documents, tiktoken_ids) for name, peer in peers.items()}

    def add(row: str, unit: str, seconds: Mapping[str, list[float]], per: Callable[[float], float]) -> None:
        variants = [
            {
                "name": name,
                "ours": name == "fastgpt",
                "median_ms": statistics.median(times) * 1e3,
                "min_ms": min(times) * 1e3,
                "rounds": len(times),
                "value": round(per(statistics.median(times)), 3),
                "exact": exact[name],
            }
            for name, times in seconds.items()
        ]
        case: dict[str, Any] = {"name": f"{arguments.encoding} {arguments.corpus} {row}", "case": row, "unit": unit}
        case |= {"encoding": arguments.encoding, "corpus": arguments.corpus, "megabytes": round(megabytes, 1)}
        cases.append(case | {"variants": variants})

    def timed(row: str, unit: str, calls: Mapping[str, Callable[[], Any]], per: Callable[[float], float]) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                seconds[name].append(cpu_s(call))
        add(row, unit, seconds, per)

    def mb_s(seconds: float) -> float:
        return megabytes / seconds

    slow = ("tokenizers",)  # a tenth of tiktoken's speed: not worth the wait in every round
    quick = {name: peer for name, peer in peers.items() if name not in slow}
    arrays = {name: partial(peer.arrays, documents) for name, peer in quick.items() if peer.arrays}
    timed("batch to NumPy, warm", "MB/s", arrays, mb_s)
    timed("batch to lists, warm", "MB/s", {name: partial(peer.lists, documents) for name, peer in quick.items()}, mb_s)

    def each(peer: Peer, texts: list[str]) -> None:
        for text in texts:
            peer.one(text)

    for label, size in (("100 B", 100), ("1 KB", 1000)):
        texts = [text[:size] for text in documents[:300]]
        calls = {name: partial(each, peer, texts) for name, peer in quick.items()}
        timed(f"one string of {label}", "us", calls, lambda seconds: seconds / len(documents[:300]) * 1e6)
    ids = [id for part in tiktoken_ids for id in part]
    decoders = {name: partial(peer.decode, ids) for name, peer in quick.items() if peer.decode}
    timed("decode a list", "MB/s", decoders, mb_s)
    cold_s: dict[str, list[float]] = {}
    first_s: dict[str, list[float]] = {}
    for name in quick:
        command = [sys.executable, "-m", "benchmarks.bench_tokenizer", "--cold", name]
        for option in ("corpora", "vocab", "encoding", "corpus", "mb"):
            command += [f"--{option}", str(getattr(arguments, option))]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
        cold_s[name] = [run["s"] for run in runs]
        first_s[name] = [run["first_call_ms"] / 1e3 for run in runs]
    add("batch to NumPy, cold", "MB/s", cold_s, mb_s)
    add("first call", "ms", first_s, lambda seconds: seconds * 1e3)
    return cases


def package_versions() -> dict[str, str | None]:
    """The versions of what is compared; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def keep(out: Path, cases: list[dict[str, Any]], machine: dict[str, Any]) -> Path:
    """Put cases into the result file, beside those of other encodings and corpora that are there."""
    file = out / record.slug(machine["chip"]) / "tokenizer.json"
    names = {case["name"] for case in cases}
    older = [case for case in record.read(file)["cases"] if case["name"] not in names] if file.exists() else []
    result = {
        "benchmark": "tokenizer",
        "command": "python -m benchmarks.bench_tokenizer",
        "date": record.now(),
        "machine": machine,
        "versions": record.versions() | package_versions(),
        "method": "CPU time of one process on one core; warm: medians of 5 rounds in turns; cold: of 3 fresh processes",
        "cases": older + cases,
        "failed": {},
    }
    return record.write(out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--vocab", type=Path, required=True)
    parser.add_argument("--encoding", default="cl100k_base", choices=["r50k_base", "cl100k_base", "o200k_base"])
    parser.add_argument("--corpus", default="en")
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--cpu", type=int, default=0, help="the core to run on")
    parser.add_argument("--out", type=Path, help="the folder of results; default: print only")
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {arguments.cpu})
    if arguments.cold:
        cold(arguments)
        return
    machine = record.machine() if arguments.out else {}
    cases = measure(arguments)
    for case in cases:
        values = (f"{v['name']} {v['value']}{'' if v['exact'] else ' (other ids)'}" for v in case["variants"])
        print(f"{case['name']}, {case['unit']}:", "  ".join(values))
    if arguments.out:
        print(keep(arguments.out, cases, machine))


if __name__ == "__main__":
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
