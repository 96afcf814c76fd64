"""The tokenizer against every other that is installed: tiktoken, gigatoken, fastokens, toktok, Hugging Face's
tokenizers.

    python -m benchmarks.bench_tokenizer --corpora DIR --vocab DIR [--encoding cl100k_base] [--corpus en] [--mb 20]
    [--out benchmarks/results]
    python -m benchmarks.bench_tokenizer --train FILE [--out benchmarks/results]
    python -m benchmarks.bench_tokenizer --table FILE

DIR of the corpora holds NAME_bench.txt, documents one after the other, and NAME_bench.off.npy, their byte offsets
(int64, documents + 1); DIR of the vocabularies the .tiktoken files. Everything runs pinned to one core, on one thread
each, but for the rows that say two threads. Warm rows: all in one process, in turns, the median of the rounds; each call
after one of the same library that is not timed, as the others empty the processor's caches (decoding: without). Cold rows:
a fresh process each, its first batch after a call with one word.
Times are CPU times of the process, which a busy machine disturbs less than the clock, though its caches are still
shared; with two threads, and in training, which runs in fresh processes too, the clock's. The load average goes into the
result. Ids are compared with tiktoken's (of every document) before anything is timed; who differs is marked and timed all
the same. --train trains 50,000 tokens on FILE; --table prints README's table from a result file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import record
from .tokenizer_peers import PACKAGES, Peer, load, package_versions, train

ROUNDS = 5
TRAINED_TOKENS = 50_000
TRAINERS = ("fastgpt", "gigatoken")
SLOW = ("tokenizers",)  # a tenth of tiktoken's speed: compared, not timed


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


def wall_s(call: Callable[[], Any]) -> float:
    """Seconds of a call by the clock."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def worker(arguments: argparse.Namespace) -> dict[str, float]:
    """One row of one library in this fresh process."""
    if arguments.worker == "train":
        seconds = wall_s(lambda: train(arguments.peer, arguments.train, TRAINED_TOKENS))
        return {"s": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    documents = read_documents(arguments.corpora, arguments.corpus, arguments.mb)
    for text in documents:
        text.encode()
    peer = load(arguments.peer, arguments.encoding, arguments.vocab)
    if arguments.worker == "threads":
        call = partial(peer.threads or peer.lists, documents)
        call()
        return {"s": statistics.median(wall_s(call) for _ in range(ROUNDS))}
    first = cpu_s(lambda: (peer.one_array or peer.one)("word"))
    return {"first_call_s": first, "s": cpu_s(lambda: (peer.arrays or peer.lists)(documents))}


def in_processes(
    arguments: argparse.Namespace, row: str, peers: list[str], runs: int
) -> dict[str, list[dict[str, float]]]:
    """What `worker` gives in so many fresh processes of every library, in turns; those that fail are left out."""
    command = [sys.executable, "-m", "benchmarks.bench_tokenizer", "--worker", row]
    for option in ("corpora", "vocab", "encoding", "corpus", "mb", "cpu", "train"):
        if (value := getattr(arguments, option)) is not None:
            command += [f"--{option}", str(value)]
    threads = "1" if row == "cold" else "2"
    environment = os.environ | {"RAYON_NUM_THREADS": threads}
    results: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for _ in range(runs):
        for peer in list(results):
            done = subprocess.run([*command, "--peer", peer], capture_output=True, env=environment)
            if done.returncode:
                said = done.stderr.decode().strip().splitlines() or [f"exit status {done.returncode}"]
                print(f"{peer}: left out ({said[-1]})", file=sys.stderr)
                del results[peer]
            else:
                results[peer].append(json.loads(done.stdout.splitlines()[-1]))
    return results


class Cases:
    """The rows of a result, as they are measured."""

    def __init__(self, common: dict[str, Any], exact: Mapping[str, bool]) -> None:
        self.common, self.exact = common, exact
        self.cases: list[dict[str, Any]] = []

    def add(
        self,
        row: str,
        unit: str,
        seconds: Mapping[str, list[float]],
        per: Callable[[float], float],
        more: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """One row: the seconds of every library's rounds, and what they are in `unit`."""
        variants = [
            {
                "name": name,
                "ours": name == "fastgpt",
                "median_ms": statistics.median(times) * 1e3,
                "min_ms": min(times) * 1e3,
                "rounds": len(times),
                "value": round(per(statistics.median(times)), 3),
                "exact": self.exact.get(name),
            }
            | (more or {}).get(name, {})
            for name, times in seconds.items()
        ]
        name = " ".join(str(self.common[key]) for key in ("encoding", "corpus") if key in self.common)
        case = {"name": f"{name} {row}".strip(), "case": row, "unit": unit}
        self.cases.append(case | self.common | {"variants": variants})

    def timed(
        self,
        row: str,
        unit: str,
        calls: Mapping[str, Callable[[], Any]],
        per: Callable[[float], float],
        warm: bool = False,
    ) -> None:
        """One row of calls in turns; with warm, each after one that is not timed."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                if warm:
                    call()
                seconds[name].append(cpu_s(call))
        self.add(row, unit, seconds, per)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one encoding and corpus."""
    documents = read_documents(arguments.corpora, arguments.corpus, arguments.mb)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    peers: dict[str, Peer] = {}
    for name in PACKAGES:
        try:
            peers[name] = load(name, arguments.encoding, arguments.vocab)
        except (ImportError, ValueError, KeyError, RuntimeError) as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    tiktoken_ids = peers["tiktoken"].lists(documents)
    exact = {name: same_ids(peer, documents, tiktoken_ids) for name, peer in peers.items()}
    common = {"encoding": arguments.encoding, "corpus": arguments.corpus, "megabytes": round(megabytes, 1)}
    rows = Cases(common, exact)

    def mb_s(seconds: float) -> float:
        return megabytes / seconds

    quick = {name: peer for name, peer in peers.items() if name not in SLOW}
    arrays = {name: partial(peer.arrays, documents) for name, peer in quick.items() if peer.arrays}
    lists = {name: partial(peer.lists, documents) for name, peer in quick.items()}
    rows.timed("batch to NumPy, warm", "MB/s", arrays, mb_s, warm=True)
    rows.timed("batch to lists, warm", "MB/s", lists, mb_s, warm=True)

    def each(one: Callable[[str], Any], texts: list[str]) -> None:
        for _ in range(3):
            for text in texts:
                one(text)

    calls_s = 3e-6 * len(documents[:300])  # to microseconds a call
    to_list = {name: peer.one for name, peer in quick.items()}
    to_array = {name: peer.one_array for name, peer in quick.items() if peer.one_array}
    for label, size in (("100 B", 100), ("1 KB", 1000)):
        texts = [text[:size] for text in documents[:300]]
        for kind, ones in (("a list", to_list), ("NumPy", to_array)):
            calls = {name: partial(each, one, texts) for name, one in ones.items()}
            rows.timed(f"one string of {label} to {kind}", "us", calls, lambda seconds: seconds / calls_s, warm=True)
    ids = [id for part in tiktoken_ids for id in part]
    array = np.array(ids, np.uint32)
    rows.timed("decode a list", "MB/s", {n: partial(p.decode, ids) for n, p in quick.items() if p.decode}, mb_s)
    decoders = {name: partial(peer.decode_array, array) for name, peer in quick.items() if peer.decode_array}
    rows.timed("decode an array", "MB/s", decoders, mb_s)
    if arguments.corpus == "en":
        rng = random.Random(5)
        letters = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000)) for _ in range(ROUNDS)]
        ones = to_list | to_array
        calls = {n: partial(lambda one, left: one(left.pop()), one, list(letters)) for n, one in ones.items()}
        rows.timed("1 MB of random letters", "ms", calls, lambda seconds: seconds * 1e3)
    cold = in_processes(arguments, "cold", list(quick), ROUNDS)
    rows.add("batch to NumPy, cold", "MB/s", {n: [run["s"] for run in runs] for n, runs in cold.items()}, mb_s)
    first = {name: [run["first_call_s"] for run in runs] for name, runs in cold.items()}
    rows.add("first call", "ms", first, lambda seconds: seconds * 1e3)
    threaded = in_processes(arguments, "threads", [name for name, peer in quick.items() if peer.threads], 3)
    rows.add("batch to NumPy, two threads", "MB/s", {n: [run["s"] for run in r] for n, r in threaded.items()}, mb_s)
    return rows.cases


def measure_training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The row of training, two threads."""
    seconds: dict[str, list[float]] = {}
    memory: dict[str, dict[str, Any]] = {}
    for name, runs in in_processes(arguments, "train", list(TRAINERS), 2).items():
        seconds[name] = [run["s"] for run in runs]
        memory[name] = {"peak_mb": round(max(run["peak_mb"] for run in runs))}
    rows = Cases({"megabytes": round(arguments.train.stat().st_size / 1e6, 1)}, {})
    rows.add(f"train {TRAINED_TOKENS} tokens, two threads", "s", seconds, lambda each: each, memory)
    return rows.cases


def table(result: dict[str, Any]) -> str:
    """README's table: figures of ours and how many times faster than others; of ids that differ, none."""
    peers = ("tiktoken", "gigatoken", "fastokens")
    lines = ["| tokenizer, one core unless said | fastgpt | " + " | ".join(f"against {name}" for name in peers) + " |"]
    lines.append("|---|---|" + "---|" * len(peers))
    wanted = [
        *(
            f"cl100k_base {corpus} batch to NumPy, {how}"
            for corpus in ("en", "code", "multi")
            for how in ("warm", "cold")
        ),
        *(f"{encoding} en batch to NumPy, warm" for encoding in ("r50k_base", "o200k_base")),
        "cl100k_base en batch to NumPy, two threads",
        "cl100k_base en batch to lists, warm",
        *(
            f"cl100k_base en one string of {size} to {kind}"
            for size in ("100 B", "1 KB")
            for kind in ("a list", "NumPy")
        ),
        *(f"cl100k_base en decode {what}" for what in ("a list", "an array")),
        "cl100k_base en 1 MB of random letters",
        f"train {TRAINED_TOKENS} tokens, two threads",
    ]
    cases = {case["name"]: case for case in result["cases"]}
    for name in wanted:
        if name not in cases:
            continue
        case = cases[name]
        variants = {variant["name"]: variant for variant in case["variants"]}
        ours = variants["fastgpt"]
        value = ours["value"]
        cells = [f"{value:.0f} {case['unit']}" if value >= 100 else f"{value:.3g} {case['unit']}"]
        for peer in peers:
            other = variants.get(peer)
            usable = other and other["exact"] is not False
            cells.append(f"{other['median_ms'] / ours['median_ms']:.2g} x" if other and usable else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        "method": "CPU time on one core; warm: medians of 5 rounds in turns, each call after one not timed; cold: of 5 fresh processes;"
        " two threads: the clock, 3 processes",
        "cases": older + cases,
        "failed": {},
    }
    return record.write(out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--vocab", type=Path)
    parser.add_argument("--encoding", default="cl100k_base", choices=["r50k_base", "cl100k_base", "o200k_base"])
    parser.add_argument("--corpus", default="en")
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--cpu", type=int, default=0, help="the core to run on")
    parser.add_argument("--train", type=Path, metavar="FILE", help="measure training on this text instead")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print README's table from this result file")
    parser.add_argument("--out", type=Path, help="the folder of results; default: print only")
    parser.add_argument("--worker", choices=["cold", "threads", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(record.read(arguments.table)))
        return
    if not arguments.train and not (arguments.corpora and arguments.vocab):
        parser.error("--corpora and --vocab are needed, or --train, or --table")
    one_core = arguments.worker in (None, "cold") and not arguments.train
    if hasattr(os, "sched_setaffinity") and one_core:
        os.sched_setaffinity(0, {arguments.cpu})
    elif arguments.worker == "threads" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))  # the parent's was one core
    if arguments.worker:
        print(json.dumps(worker(arguments)))
        return
    machine = record.machine() if arguments.out else {}
    cases = measure_training(arguments) if arguments.train else measure(arguments)
    for case in cases:
        values = (f"{v['name']} {v['value']}{' (other ids)' if v['exact'] is False else ''}" for v in case["variants"])
        print(f"{case['name']}, {case['unit']}:", "  ".join(values))
    if arguments.out:
        print(keep(arguments.out, cases, machine))


if __name__ == "__main__":
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
