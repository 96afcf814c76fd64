"""The one way that everything here is timed: variants of one computation, checked against each other, then timed in turns.

    def bench_softmax(compare, size, dtype):
        x = normal(*size, dtype=dtype)
        compare(
            "forward", shape=size, dtype=dtype,
            variants=[ours(lambda: ops.softmax(x)), Variant("torch eager", lambda: torch.softmax(x, -1))],
            expected=lambda: (reference.softmax(x.double(), None, 1.0, False),),
            bytes_moved=2 * x.nbytes,
        )

A case runs in this order:

1. Every variant runs once, and what it returns is compared with `expected`, computed in float64. The error is the largest difference
   over the largest expected value. Ours may be off by twice the baseline's error (the first variant that is not ours) plus
   `SLACK`, and never by more than `OURS_AT_MOST`; any other variant by `OTHERS_AT_MOST`, beyond which it computes something else. A
   case that breaks this fails and gives no numbers.
2. Every variant is warmed up and gets a number of calls a round such that a round takes at least ROUND_S.
3. Rounds go through all variants in turn, each round beginning with another one, until MIN_ROUNDS are done and BUDGET_S is over
   (MAX_ROUNDS at most). The clock drifts and other work intrudes; in turns, it does so for all variants alike.

Clock and statistics (median, quartiles) are pytest-benchmark's, and its table at the end of a run shows every variant. Garbage
collection is off while a round is timed. Results go to record.py. CPU only: nothing here waits for a device.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Metadata
from torch import Tensor

from . import plot, record
from .variants import DTYPES, METHOD, DisagreementError, Variant, check, error_of, measure, ours

__all__ = ["Compare", "DisagreementError", "Plugin", "Settings", "Variant", "ours"]


@dataclasses.dataclass
class Settings:
    """What `fastgpt bench` was asked for; `out` None writes nothing."""

    quick: bool = False
    out: Path | None = None
    command: str = "fastgpt bench"


@dataclasses.dataclass
class _Entry:
    """What pytest-benchmark's Metadata reads of its own fixture."""

    name: str
    fullname: str
    group: str
    param: None = None
    params: None = None
    cprofile_stats: None = None
    has_error: bool = False
    extra_info: dict[str, Any] = dataclasses.field(default_factory=dict)


class Compare:
    """The fixture `compare`: called once a case; see the module's docstring."""

    def __init__(self, plugin: "Plugin", request: pytest.FixtureRequest) -> None:
        self._plugin = plugin
        self._request = request
        self.quick = plugin.settings.quick

    def compiled(
        self,
        function: Callable[..., Any],
        bind: Callable[[Callable[..., Any]], Callable[[], Any]],
        *,
        name: str = "torch.compile",
    ) -> list[Variant]:
        """The variant of a function under torch.compile, in a list; an empty list in quick runs after a benchmark's first one.

        Args:
            function: what to compile, for static shapes.
            bind: makes the variant's `run` of the compiled function: `lambda f: lambda: f(x)`.
            name: the variant's.
        """
        benchmark = self._plugin.benchmark_of(self._request.node)
        if self.quick and benchmark in self._plugin.compiled_once:
            return []
        self._plugin.compiled_once.add(benchmark)
        return [Variant(name, bind(torch.compile(function, dynamic=False)), optional=True)]

    def __call__(
        self,
        case: str,
        *,
        shape: Sequence[int],
        dtype: str,
        variants: Sequence[Variant],
        expected: Callable[[], tuple[Tensor, ...]],
        pick: Callable[[Any], tuple[Tensor, ...]] = lambda result: (result,),
        error: Callable[[Tensor, Tensor], float] = error_of,
        label: str = "",
        bytes_moved: int | None = None,
        flops: int | None = None,
        tokens: int | None = None,
        rounds: int | None = None,
        output: str = "fresh",
        extra: Callable[[], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Check the variants, time them, record and print the case.

        Args:
            case: "forward", "forward and backward", ...
            shape: of the input, for the name.
            dtype: "fp32" or "bf16".
            variants: the first that is not ours is the baseline.
            expected: the right results in float64.
            pick: what to compare of a variant's result, in expected's order; may be a part where the whole would be too much memory.
            error: how far a result is from the expected one, relative to it.
            label: put before the case's name, where a benchmark has several functions; one that ends in ":" says the shape in words.
            bytes_moved, flops, tokens: of one call, counted by hand; they give GB/s, GFLOP/s and tokens/s.
            rounds: see `measure`.
            output: "fresh" where each call allocates its result, "preallocated" where it writes into memory that is there.
            extra: further facts for each variant by name, asked for after the timing.

        Raises:
            DisagreementError: see `check`.
        """
        sizes = "" if label.endswith(":") else "x".join(map(str, shape))
        name = " ".join(filter(None, [label, case, dtype, sizes]))
        variants, errors, left_out = self._run_once(variants, expected, pick, error)
        check(variants, errors, dtype)
        node = self._request.node
        benchmark = self._plugin.benchmark_of(node)
        session = self._request.config._benchmarksession  # type: ignore[attr-defined]

        def statistics(variant: Variant, iterations: int) -> Metadata:
            entry = _Entry(variant.name, f"{node.nodeid}::{name}::{variant.name}", f"{benchmark}: {name}")
            metadata = Metadata(entry, iterations, {})
            session.benchmarks.append(metadata)
            return metadata

        records = measure(variants, statistics, quick=self.quick, rounds=rounds)
        rows = []
        for variant, errs, timed in zip(variants, errors, records, strict=True):
            stats = timed.stats
            row: dict[str, Any] = {
                "name": variant.name,
                "ours": variant.ours,
                "median_ms": stats.median * 1e3,
                "min_ms": stats.min * 1e3,
                "iqr_ms": stats.iqr * 1e3,
                "rounds": stats.rounds,
                "calls_per_round": timed.iterations,
                "errors": list(errs),
            }
            if bytes_moved:
                row["gb_per_s"] = bytes_moved / stats.median / 1e9
            if flops:
                row["gflop_per_s"] = flops / stats.median / 1e9
            if tokens:
                row["tokens_per_s"] = tokens / stats.median
            rows.append(row)
        result = {
            "name": name,
            "label": label,
            "case": case,
            "dtype": dtype,
            "shape": list(shape),
            "output": output,
            "bytes_moved": bytes_moved,
            "flops": flops,
            "tokens": tokens,
            "left_out": left_out,
            "variants": rows,
        }
        for row in rows:
            row.update((extra() if extra is not None else {}).get(row["name"], {}))
        self._plugin.add(benchmark, result)
        return result

    def _run_once(
        self,
        variants: Sequence[Variant],
        expected: Callable[[], tuple[Tensor, ...]],
        pick: Callable[[Any], tuple[Tensor, ...]],
        error: Callable[[Tensor, Tensor], float],
    ) -> tuple[list[Variant], list[list[float]], dict[str, str]]:
        """Every variant's errors, and why optional ones are left out."""
        right = expected()
        kept, errors, left_out = [], [], {}
        for variant in variants:
            if variant.before is not None:
                variant.before()
            try:
                found = pick((variant.first or variant.run)())
            except Exception as reason:
                if not variant.optional:
                    raise
                left_out[variant.name] = " ".join(str(reason).split())[:300]
                continue
            kept.append(variant)
            errors.append([error(f, r) for f, r in zip(found, right, strict=True)])
        return kept, errors, left_out


class Plugin:
    """The pytest plugin of one run: the fixture, the sizes, what is printed, and writing each benchmark's results when it is done."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.compiled_once: set[str] = set()
        self.cases: dict[str, list[dict[str, Any]]] = {}
        self.failed: dict[str, dict[str, str]] = {}
        self.written: list[Path] = []
        self._machine: dict[str, Any] | None = None
        self._say: Callable[[str], None] = print

    @staticmethod
    def benchmark_of(item: pytest.Item) -> str:
        """The name of an item's benchmark: its file's, less bench_."""
        return item.path.stem.removeprefix("bench_")

    @pytest.fixture
    def compare(self, request: pytest.FixtureRequest) -> Compare:
        return Compare(self, request)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A function with `size` runs for each of its module's SIZES, one with `dtype` for each of DTYPES."""
        if "size" in metafunc.fixturenames:
            sizes = metafunc.module.SIZES["quick" if self.settings.quick else "full"]
            metafunc.parametrize("size", sizes, ids=["x".join(map(str, size)) for size in sizes])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", list(DTYPES))

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._machine = record.machine()  # before the run: its load average should not be the run's own
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            self._say = reporter.write_line

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed", "", "") if report.passed and report.when == "call" else None  # each case prints its own line

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[Any]) -> None:
        if call.excinfo is not None:
            self.failed.setdefault(self.benchmark_of(node), {})[node.name] = call.excinfo.exconly()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # compiled code of one benchmark must not count against the next one's limit
        gc.collect()
        if nextitem is None or nextitem.path != item.path:
            self._finish(self.benchmark_of(item))

    def add(self, benchmark: str, case: dict[str, Any]) -> None:
        """Keep a case, and print it."""
        self.cases.setdefault(benchmark, []).append(case)
        self._say(summary(benchmark, case))

    def _finish(self, benchmark: str) -> None:
        if self.settings.out is None or not self.cases.get(benchmark):
            return
        from fastgpt.ops import backend

        file = record.write(
            self.settings.out,
            {
                "benchmark": benchmark,
                "command": self.settings.command,
                "date": record.now(),
                "machine": self._machine,
                "versions": record.versions(),
                "engine": backend.engine_of(benchmark)[0] if benchmark in backend.op_names() else None,
                "method": "quick: not for reading" if self.settings.quick else METHOD,
                "cases": self.cases[benchmark],
                "failed": self.failed.get(benchmark, {}),
            },
        )
        self.written += [file, plot.draw(file)]


def summary(benchmark: str, case: dict[str, Any]) -> str:
    """One line: each variant's median and spread, and how many times slower than fastgpt's first variant it is.

    >>> row = {"name": "fastgpt", "ours": True, "median_ms": 2.0, "iqr_ms": 0.1}
    >>> case = {"name": "forward fp32 4x4", "variants": [row, {"name": "torch", "ours": False, "median_ms": 5.0, "iqr_ms": 0.5}]}
    >>> summary("softmax", case)
    'softmax forward fp32 4x4: fastgpt 2.00 ms +-5% | torch 5.00 ms +-10% 2.50x'
    """
    rows = case["variants"]
    base = next((row["median_ms"] for row in rows if row["ours"]), None)
    words = []
    for row in rows:
        text = (
            f"{row['name']} {row['median_ms']:.3g}" if row["median_ms"] < 1 else f"{row['name']} {row['median_ms']:.2f}"
        )
        text += f" ms +-{100 * row['iqr_ms'] / row['median_ms']:.0f}%"
        if "tokens_per_s" in row:
            text += f" {row['tokens_per_s']:,.0f} tokens/s"
        if base and not (row["ours"] and row["median_ms"] == base):
            text += f" {row['median_ms'] / base:.2f}x"
        words.append(text)
    left_out = "".join(f" | {name} left out: {why}" for name, why in case.get("left_out", {}).items())
    return f"{benchmark} {case['name']}: " + " | ".join(words) + left_out
