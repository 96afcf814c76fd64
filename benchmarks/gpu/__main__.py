"""The command: `python -m benchmarks.gpu --out DIR`; see the package's docstring."""

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgpt.ops import backend

from .. import record
from ..variants import DisagreementError, Variant, check
from .cases import plan
from .kit import Case, Kit, Made
from .step import train_step
from .supervise import DeviceLostError, State, supervise
from .timing import METHOD, CudaTimer, Timer, WallTimer, measure

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
        state: where it goes on, and what it writes as it goes.
    """

    def __init__(
        self, out: Path, kit: Kit, timer: Timer, clock: Callable[[], float] = time.perf_counter, *, limit_s: float = LIMIT_S,
        command: str = "", state: State | None = None,
    ) -> None:  # fmt: skip
        self.out, self.kit, self.timer, self.clock = out, kit, timer, clock
        self.end, self.command = clock() + limit_s, command
        self.state = state or State(None)
        self.machine = record.machine()
        if kit.device.type == "cuda":
            self.machine["chip"] = torch.cuda.get_device_name(kit.device)
        self.results, self.ceilings = self.state.results, self.state.ceilings

    def measure_ceilings(self, copied: int = 1 << 30, size: int = 8192) -> None:
        """GB/s of a device copy of so many bytes (read and write counted), TFLOP/s of a square bf16 product of that size."""
        if self.ceilings or self.state.ended.get(""):  # measured before, or what ended a worker
            return
        kit = self.kit
        source = kit.normal(copied // 4, dtype="fp32")
        target = torch.empty_like(source)
        a, b = (kit.normal(size, size, dtype="bf16") for _ in range(2))
        runs = [Variant("copy", lambda: target.copy_(source)), Variant("product", lambda: a @ b)]
        times = measure(runs, self.timer, self.clock)
        self.ceilings |= {
            "copy_gb_per_s": 2 * source.nbytes / times[0].median / 1e9,
            "product_tflop_per_s": 2 * size**3 / times[1].median / 1e12,
        }
        self.state.write()
        print(", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items()), flush=True)

    def cases(self, cases: Sequence[Case]) -> None:
        """Measure them in order; what there is no time for is recorded as such."""
        for index, case in enumerate(cases):
            if index < self.state.case:
                continue
            label = name_of(case)
            place = f"{case.op} {label}"
            left = self.end - self.clock()
            whole = self.state.ended.get(place, {}).get("")
            if left <= 0 or whole:
                self._keep(case, failed={label: whole or "the time was over"})
                self.state.write(case=index + 1)
                continue
            self.state.write(label=place, at="")
            compiles, self.kit.compiles = self.kit.compiles, self.kit.compiles and left > COMPILE_S
            try:
                self._case(case, label)
            except Exception as error:  # one case must not end the run
                self._keep(case, failed={label: reason(error)})
                if not answers(self.kit.device):
                    self.state.write(case=index + 1, why=f"the device is lost: {reason(error)}")
                    raise DeviceLostError(reason(error)) from error
            finally:
                self.kit.compiles = compiles
                # Compiled code is kept by a function's code, which torch's own functions share; at the ninth torch.compile would
                # give up without an error and time eager code under its name.
                torch._dynamo.reset()
            self.state.write(case=index + 1, label="between cases", at="")
            if self.kit.device.type == "cuda":
                torch.cuda.empty_cache()

    def _case(self, case: Case, label: str) -> None:
        made = case.make(self.kit)
        ended = self.state.ended.get(f"{case.op} {label}", {})
        kept, errors, left_out = checked(made, case.dtype, self.kit.device, ended, lambda at: self.state.write(at=at))
        self.state.write(at="")
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


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def answers(device: torch.device) -> bool:
    """Whether the device still works for this process; after an illegal address it does not, and every call raises."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def checked(
    made: Made, dtype: str, device: torch.device, ended: dict[str, str] | None = None, at: Callable[[str], None] = lambda _: None
) -> tuple[list[Variant], list[list[float]], dict[str, str]]:  # fmt: skip
    """Run every variant once and hold it to the harness's rule: those that pass, their errors, and why the others are left out.

    Args:
        made, dtype: the case.
        device: is waited for after each variant, so that what a kernel does wrong is not taken for the next one's.
        ended: variants that ended an earlier process, which are not run, and how.
        at: is told which variant is next.

    Raises:
        DeviceLostError: the device does not answer after a variant.
    """
    right = made.expected()
    ran: list[tuple[Variant, list[float]]] = []
    left_out: dict[str, str] = {}
    for variant in made.variants:
        if ended and variant.name in ended:
            left_out[variant.name] = ended[variant.name]
            continue
        at(variant.name)
        try:
            found = made.pick((variant.first or variant.run)())
            wrong = [made.error(f, r) for f, r in zip(found, right, strict=True)]
            if variant.first is not None:
                variant.run()  # which may be compiled only now
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            if not answers(device):
                raise DeviceLostError(reason(error)) from error
            left_out[variant.name] = reason(error)
            continue
        ran.append((variant, wrong))
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


def work(given: argparse.Namespace, cases: Sequence[Case], command: str) -> int:
    """A worker: measures from where the state says, and leaves its exit code there."""
    state = State(given.state)
    state.write()  # the worker's first word
    device = "cpu" if given.small else "cuda"
    candidates = ("cpu",) if given.small else ("triton", "cuda")
    reasons = {engine: backend.unavailable(engine) for engine in candidates}
    for engine, why in reasons.items():
        print(f"engine {engine}: {why or 'is there'}", flush=True)
    kit = Kit(
        device, [e for e in candidates if reasons[e] is None], not given.small, int.from_bytes(os.urandom(4), "little")
    )
    timer = CudaTimer(kit.device) if device == "cuda" else WallTimer()
    out = given.out or record.default_out()
    run = Run(out, kit, timer, limit_s=given.seconds - 10, command=command, state=state)
    try:
        run.measure_ceilings(*((1 << 12, 16) if given.small else ()))
        run.cases(cases)
    except DeviceLostError as error:
        state.write(why=f"the device is lost: {error}")
        os._exit(4)  # Python's own end would call the device again
    except Exception:
        traceback.print_exc()
        os._exit(5)
    code = 1 if any(result["failed"] for result in run.results.values()) or not kit.engines else 0
    state.write(code=code)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and return the exit code: 1 where a case failed or fastgpt has no engine, 2 without a GPU, 3 where time ran out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results in a checkout)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop; needs no GPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to see that the command works")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="stop after so many (default: %(default).0f)")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)  # of a worker; see supervise.py
    given = parser.parse_args(arguments)
    cases = plan(given.small)
    cases.insert(4, train_step(2, small=True) if given.small else train_step(16))
    if given.dry_run:
        dry_run(cases)
        return 0
    if not given.small and not torch.cuda.is_available():
        print("torch sees no CUDA device; --dry-run prints the plan", file=sys.stderr)
        return 2
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if given.state is not None:
        return work(given, cases, " ".join(["python -m benchmarks.gpu", *typed[:-4]]))  # less what supervise() adds
    with tempfile.TemporaryDirectory() as folder:
        return supervise([sys.executable, "-m", str(__package__), *typed], Path(folder) / "state.json", given.seconds)


if __name__ == "__main__":
    sys.exit(main())
