"""The command: `python -m benchmarks.gpu --out DIR`; see the package's docstring."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt.ops import backend

from .. import record
from ..harness import DisagreementError, Variant, check
from .cases import plan
from .kit import Case, Kit, Made
from .step import train_step
from .timing import METHOD, CudaTimer, Timer, measure

LIMIT_S = 480.0
COMPILE_S = 45.0  # left for a case with torch.compile; less, and it goes without


class Run:
    """One run: measures cases in order until the time is over, and writes each as it is done.

    Args:
        out: where results go.
        kit: makes the inputs.
        timer, clock: for calls, and for the whole.
        limit_s: from now on.
        command: as it was typed, for the record.
    """

    def __init__(
        self, out: Path, kit: Kit, timer: Timer, clock: Callable[[], float] = time.perf_counter, *, limit_s: float = LIMIT_S,
        command: str = "",
    ) -> None:  # fmt: skip
        self.out, self.kit, self.timer, self.clock = out, kit, timer, clock
        self.end, self.command = clock() + limit_s, command
        self.machine = record.machine()
        if kit.device.type == "cuda":
            self.machine["chip"] = torch.cuda.get_device_name(kit.device)
        self.results: dict[str, dict[str, Any]] = {}
        self.ceilings: dict[str, float] = {}

    def measure_ceilings(self, copied: int = 1 << 30, size: int = 8192) -> None:
        """GB/s of a device copy of so many bytes (read and write counted), TFLOP/s of a square bf16 product of that size."""
        kit = self.kit
        source = kit.normal(copied // 4, dtype="fp32")
        target = torch.empty_like(source)
        a, b = (kit.normal(size, size, dtype="bf16") for _ in range(2))
        runs = [Variant("copy", lambda: target.copy_(source)), Variant("product", lambda: a @ b)]
        times = measure(runs, self.timer, self.clock)
        self.ceilings = {
            "copy_gb_per_s": 2 * source.nbytes / times[0].median / 1e9,
            "product_tflop_per_s": 2 * size**3 / times[1].median / 1e12,
        }
        print(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()), flush=True)

    def cases(self, cases: Sequence[Case]) -> None:
        """Measure them in order; what there is no time for is recorded as such."""
        for case in cases:
            label = name_of(case)
            left = self.end - self.clock()
            if left <= 0:
                self._keep(case, failed={label: "the time was over"})
                continue
            compiles, self.kit.compiles = self.kit.compiles, self.kit.compiles and left > COMPILE_S
            try:
                self._case(case, label)
            except Exception as error:  # one case must not end the run
                self._keep(case, failed={label: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            finally:
                self.kit.compiles = compiles
                if self.kit.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _case(self, case: Case, label: str) -> None:
        made = case.make(self.kit)
        kept, errors, left_out = checked(made, case.dtype)
        times = measure(kept, self.timer, self.clock)
        rows = []
        for variant, found, took in zip(kept, errors, times, strict=True):
            row: dict[str, Any] = {
                "name": variant.name, "ours": variant.ours, "median_ms": took.median * 1e3, "min_ms": min(took.seconds) * 1e3,
                "iqr_ms": took.quartile_range * 1e3, "rounds": len(took.seconds), "calls_per_round": 1, "errors": found,
            }  # fmt: skip
            if case.bytes_moved:
                row["gb_per_s"] = case.bytes_moved / took.median / 1e9
                if "copy_gb_per_s" in self.ceilings:
                    row["share_of_copy"] = row["gb_per_s"] / self.ceilings["copy_gb_per_s"]
            if case.flops:
                row["gflop_per_s"] = case.flops / took.median / 1e9
                if "product_tflop_per_s" in self.ceilings:
                    row["share_of_product"] = row["gflop_per_s"] / 1e3 / self.ceilings["product_tflop_per_s"]
            if case.tokens:
                row["tokens_per_s"] = case.tokens / took.median
            rows.append(row)
        result = {
            "name": label, "label": "", "case": case.case, "dtype": case.dtype, "shape": list(case.shape), "output": "fresh",
            "bytes_moved": case.bytes_moved or None, "flops": case.flops or None, "tokens": case.tokens or None,
            "left_out": left_out, "variants": rows,
        }  # fmt: skip
        self._keep(case, result)
        print(
            f"{case.op} {label}: " + ", ".join(f"{row['name']} {row['median_ms']:.4g} ms" for row in rows), flush=True
        )
        for name, why in left_out.items():
            print(f"  left out {name}: {why}", flush=True)

    def _keep(self, case: Case, result: dict[str, Any] | None = None, failed: dict[str, str] | None = None) -> None:
        """Add to the op's file and write it."""
        entry = self.results.setdefault(
            case.op,
            {
                "benchmark": f"gpu_{case.op}", "command": self.command, "date": record.now(), "machine": self.machine,
                "versions": record.versions(), "engine": ", ".join(self.kit.engines), "method": METHOD, "ceilings": self.ceilings,
                "cases": [], "failed": {},
            },
        )  # fmt: skip
        if result is not None:
            entry["cases"].append(result)
        entry["failed"].update(failed or {})
        for label, why in (failed or {}).items():
            print(f"{case.op} {label} failed: {why}", file=sys.stderr, flush=True)
        record.write(self.out, entry)


def name_of(case: Case) -> str:
    return f"{case.case} {case.dtype} {'x'.join(map(str, case.shape))}"


def checked(made: Made, dtype: str) -> tuple[list[Variant], list[list[float]], dict[str, str]]:
    """Run every variant once and hold it to the harness's rule: those that pass, their errors, and why the others are left out."""
    right = made.expected()
    ran: list[tuple[Variant, list[float]]] = []
    left_out: dict[str, str] = {}
    for variant in made.variants:
        try:
            found = made.pick((variant.first or variant.run)())
        except Exception as error:
            left_out[variant.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        ran.append((variant, [made.error(f, r) for f, r in zip(found, right, strict=True)]))
    baseline = next(((v, e) for v, e in ran if not v.ours), None)
    kept, errors = [], []
    for variant, wrong in ran:
        pair = [(variant, wrong)] if baseline is None or not variant.ours else [baseline, (variant, wrong)]
        try:
            check([v for v, _ in pair], [e for _, e in pair], dtype)
        except DisagreementError as error:
            left_out[variant.name] = str(error)
            continue
        kept.append(variant)
        errors.append(wrong)
    return kept, errors, left_out


def dry_run(cases: Sequence[Case]) -> None:
    """Print the plan."""
    kit = Kit("meta", ["triton", "cuda"], compiles=True, seed=0)
    print(f"ceilings: device copy, bf16 product; then {len(cases)} cases, at most {LIMIT_S:.0f} s:")
    for case in cases:
        size = f"{case.bytes_moved / 1e9:.3g} GB" if case.bytes_moved else f"{case.flops / 1e12:.3g} TFLOP"
        print(f"{case.op:20} {name_of(case):50} {size:12} {', '.join(v.name for v in case.make(kit).variants)}")


def _stop_at(seconds: float) -> None:
    """End the process then, whatever it is doing: every finished row is on disk."""

    def stop() -> None:
        print(f"stopped after {seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code: 1 where a case failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results in a checkout)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; needs no GPU")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="stop after so many (default: %(default).0f)")
    given = parser.parse_args(arguments)
    cases = plan()
    cases.insert(4, train_step(16))
    if given.dry_run:
        dry_run(cases)
        return 0
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry-run prints the plan", file=sys.stderr)
        return 2
    _stop_at(given.seconds + 5)
    engines = [engine for engine in ("triton", "cuda") if backend.unavailable(engine) is None]
    kit = Kit("cuda", engines, compiles=True, seed=int.from_bytes(os.urandom(4), "little"))
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    run = Run(
        given.out or record.default_out(), kit, CudaTimer(kit.device), limit_s=given.seconds - 10, command=command
    )
    run.measure_ceilings()
    run.cases(cases)
    return 1 if any(result["failed"] for result in run.results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
