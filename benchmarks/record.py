"""Where benchmark results lie, what is recorded beside the numbers, and reading and writing them.

A result is `<out>/<chip>/<benchmark>.json`, one file a benchmark and a chip, replaced as a whole by the next run:

    benchmark, command, date        what was run, and when (UTC, ISO 8601)
    machine                         chip, cores, memory, instruction set in use, threads, system, CUDA device or None, load average
                                    before the run (above 0 on a machine that does something else too)
    versions                        fastgpt, python, torch, triton, numpy, pytest-benchmark
    engine                          fastgpt's engine for the op, where the benchmark is of one op
    method                          how it was timed
    cases                           a list; see harness.py
    failed                          {case: why} of those that gave no numbers; empty in a good run
"""

import datetime
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

from fastgpt import info


def slug(name: str) -> str:
    """A chip's name as a folder's.

    >>> slug("AMD EPYC (family 25, model 17)")
    'amd-epyc-family-25-model-17'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def default_out() -> Path:
    """benchmarks/results in a checkout of the project, fastgpt-bench anywhere else; relative to the current folder."""
    in_checkout = Path("benchmarks/harness.py").is_file() and Path("fastgpt/__init__.py").is_file()
    return Path("benchmarks/results") if in_checkout else Path("fastgpt-bench")


def machine() -> dict[str, Any]:
    """What the numbers were taken on; see the module's docstring."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = info.collect()
    return {
        "chip": found["chip"]["name"],
        "cores": found["chip"]["cores"],
        "memory_gib": found["chip"]["memory_gib"],
        "isa": found["isa"]["used"],
        "threads": found["threads"],
        "system": found["system"],
        "cuda": found["cuda"]["device"],
        "load_average_before": None if load is None else round(load, 2),
    }


def versions() -> dict[str, str | None]:
    """fastgpt's and its neighbours' versions."""
    try:
        timer: str | None = importlib.metadata.version("pytest-benchmark")
    except importlib.metadata.PackageNotFoundError:  # the GPU benchmark does without
        timer = None
    return {**info.versions(), "pytest-benchmark": timer}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(out: Path, result: dict[str, Any]) -> Path:
    """Write a result below `out`, replacing an older one in one step; returns the file."""
    file = out / slug(result["machine"]["chip"]) / f"{result['benchmark']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".json.part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, file)
    return file


def read(file: Path) -> dict[str, Any]:
    """A result as `write` took it.

    Raises:
        ValueError: the file is not a benchmark's result; names it.
    """
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(result, dict) or not {"benchmark", "machine", "cases"} <= result.keys():
        raise ValueError(f"{file}: is not a benchmark's result (it has no benchmark, machine and cases)")
    return result


def results(out: Path) -> list[Path]:
    """Every result file below `out`, sorted."""
    return sorted(out.glob("*/*.json"))
