"""What this machine has and what fastgpt will use of it: versions, chip, instruction sets, threads, devices, each op's engine.

`fastgpt info` prints it, `fastgpt info --json` prints the same as JSON, the benchmarks record it beside their numbers. It is what to
look at when something does not work, so nothing that is missing or wrong stops it: an extension that does not load, a
FASTGPT_BACKEND or FASTGPT_CPU_ISA that names nothing, no triton, no CUDA. Each of those is reported with its reason.

It measures nothing and changes nothing.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastgpt import __version__
from fastgpt.errors import UserError

_PACKAGES = ("torch", "triton", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of fastgpt, python, torch, triton and numpy; None for what is not installed.

    >>> sorted(versions())
    ['fastgpt', 'numpy', 'python', 'torch', 'triton']
    """
    found: dict[str, str | None] = {"fastgpt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def chip(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with its family and model numbers where the name alone does not tell which one it is.

    Args:
        cpuinfo: a file in the form of Linux's /proc/cpuinfo; where it is not there, Python's own idea of the processor is used.
    """
    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = " ".join(re.sub(r"\((R|TM)\)", "", fields.get("model name", ""), flags=re.IGNORECASE).split())
    if not name and "CPU part" in fields:  # ARM gives numbers only
        name = f"ARM implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    if not name:
        return platform.processor() or platform.machine() or "unknown"
    if not re.search(r"\d", name) and "cpu family" in fields:  # a virtual machine says only "AMD EPYC"
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Main memory in GiB, or None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def instruction_sets() -> dict[str, Any]:
    """`available` (list), `used` (name or None) and `error` (why none is used, or None) of the C++ engine."""
    found: dict[str, Any] = {"available": [], "used": None, "error": None}
    try:
        importlib.import_module("torch")  # before _cpu, so that both share one OpenMP
        kernels = importlib.import_module("fastgpt._cpu")
        found["available"] = list(kernels.available_isas())
        found["used"] = kernels.isa()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        found["error"] = _reason(error)
    return found


def cuda() -> dict[str, Any]:
    """`device` (name, compute capability, memory) or None, and `reason` (why there is none) or None."""
    found: dict[str, Any] = {"device": None, "reason": None}
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        found["reason"] = f"torch does not load: {_reason(error)}"
        return found
    if torch.version.cuda is None:
        found["reason"] = f"torch {torch.__version__} is built without CUDA"
        return found
    try:
        torch.cuda.init()
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "count": torch.cuda.device_count(),
            "toolkit": torch.version.cuda,
        }
    except (RuntimeError, AssertionError) as error:  # no driver, no device, a driver that is too old
        found["reason"] = _reason(error)
    return found


def cuda_kernels() -> str | None:
    """By what the kernels of the engine `cuda` are compiled, and when; None where the extension is not built."""
    try:
        way: str | None = importlib.import_module("fastgpt.ops.cuda").way()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return f"kernels unknown: {_reason(error)}"
    return way


def _load_ops() -> tuple[Any, str | None]:
    """The module fastgpt.ops.backend (None where it does not load), and what was wrong on the way.

    A FASTGPT_BACKEND that cannot be used makes `import fastgpt.ops` raise. The ops are then loaded without it, so that the table can
    still be shown.
    """
    try:
        importlib.import_module("fastgpt.ops")
        return importlib.import_module("fastgpt.ops.backend"), None
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        wrong = _reason(error)
    variable = os.environ.pop("FASTGPT_BACKEND", None)
    if variable is None:
        return None, wrong
    try:
        importlib.import_module("fastgpt.ops")
        return importlib.import_module("fastgpt.ops.backend"), wrong
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return None, f"{wrong}; and without it: {_reason(error)}"
    finally:
        os.environ["FASTGPT_BACKEND"] = variable


def engines(devices: Sequence[str] = ("cpu",)) -> dict[str, Any]:
    """The engine that each op uses first on each device type, and why it is not another one.

    Args:
        devices: torch device types, such as "cpu" and "cuda".

    Returns:
        variable: FASTGPT_BACKEND's value, or None.
        forced: the forced engine, "auto" for none, None where the ops do not load.
        error: what is wrong with the variable or the ops, or None. With an error the rest is the choice without the variable.
        unavailable: {engine: why it cannot run in this process, or None where it can}.
        ops: {device: {op: {"engine": name or None, "not_used": {engine that would come first: why it is not used}}}}; empty where the
            ops do not load.

    >>> engines()["unavailable"]["reference"] is None
    True
    """
    backend, wrong = _load_ops()
    found: dict[str, Any] = {
        "variable": os.environ.get("FASTGPT_BACKEND"),
        "forced": None,
        "error": wrong,
        "unavailable": {},
        "ops": {},
    }
    if backend is None:
        return found
    found["forced"] = backend.get_backend()
    found["unavailable"] = {engine: backend.unavailable(engine) for engine in backend.ENGINES}
    for device in devices:
        table = found["ops"][device] = {}
        for op in backend.op_names():
            try:
                engine, not_used = backend.engine_of(op, device)
            except backend.EngineUnavailableError as error:
                engine, not_used = None, {"all": _reason(error)}
            table[op] = {"engine": engine, "not_used": not_used}
    return found


def _threads() -> int | None:
    try:
        return int(importlib.import_module("torch").get_num_threads())
    except (ImportError, OSError):
        return None


def collect() -> dict[str, Any]:
    """Everything, as plain values that JSON holds.

    Keys: versions, system, chip (name, cores, memory_gib), isa (`instruction_sets`), threads, cuda (`cuda`) and engines (`engines`,
    with a table for "cuda" only where there is a CUDA device).

    >>> collect()["chip"]["cores"] >= 1
    True
    """
    device = cuda()
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "chip": {"name": chip(), "cores": cores(), "memory_gib": memory_gib()},
        "isa": instruction_sets(),
        "threads": _threads(),
        "cuda": device,
        "cuda_kernels": cuda_kernels(),
        "engines": engines(("cpu", "cuda") if device["device"] else ("cpu",)),
    }


def render(found: dict[str, Any]) -> str:
    """The text of `fastgpt info` for what `collect` returned."""
    lines = [f"{name:12}{version or 'not installed'}" for name, version in found["versions"].items()]
    place = found["chip"]
    memory = f", {place['memory_gib']:g} GiB" if place["memory_gib"] else ""
    lines.append(f"{'system':12}{found['system']}")
    lines.append(f"{'chip':12}{place['name']}, {place['cores']} cores{memory}")

    isa = found["isa"]
    available = f"available: {', '.join(isa['available'])}" if isa["available"] else "none available"
    in_use = f"{isa['used']} in use" if isa["used"] else f"none in use: {isa['error']}"
    lines.append(f"{'isa':12}{in_use}; {available}")
    lines.append(f"{'threads':12}{found['threads'] if found['threads'] is not None else 'torch does not load'}")

    lines.append(f"{'cuda':12}{_cuda_words(found['cuda'])}")
    if found["cuda_kernels"] is not None:
        lines.append(f"{'cuda':12}{found['cuda_kernels']}")
    lines.append(f"{'backend':12}{_backend_words(found['engines'])}")
    for engine, why in found["engines"]["unavailable"].items():
        lines.append(f"{'engine':12}{engine:12}{'available' if why is None else f'not available: {why}'}")
    return "\n".join([*lines, "", *_table(found["engines"])])


def _cuda_words(found: dict[str, Any]) -> str:
    device = found["device"]
    if device is None:
        return f"none: {found['reason']}"
    words = f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']:g} GiB, CUDA {device['toolkit']}"
    return words + (f", the first of {device['count']}" if device["count"] > 1 else "")


def _backend_words(found: dict[str, Any]) -> str:
    if found["error"] is None:
        return str(found["forced"]) + ("" if found["forced"] == "auto" else " (forced)")
    if found["variable"] is None or not found["ops"]:
        return f"error: {found['error']}"
    return f"error: {found['error']} (FASTGPT_BACKEND={found['variable']}; what follows is without it)"


def _table(found: dict[str, Any]) -> list[str]:
    """A line an op: its engine on each device, and the reasons against others that are the op's own, not the engine's."""
    table = found["ops"]
    if not table:
        return ["no ops: fastgpt.ops does not load (see backend)"]
    devices = list(table)
    width = max(map(len, table[devices[0]])) + 2
    lines = [f"{'op':{width}}" + "".join(f"{'on ' + device:14}" for device in devices).rstrip()]
    for op in table[devices[0]]:
        row = f"{op:{width}}" + "".join(f"{table[device][op]['engine'] or 'none':14}" for device in devices)
        own = {
            f"not {engine}: {why}"
            for device in devices
            for engine, why in table[device][op]["not_used"].items()
            if found["forced"] == "auto" and why != found["unavailable"].get(engine)
        }
        lines.append((row + "; ".join(sorted(own))).rstrip())
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """`fastgpt info [--json]`; prints and returns the exit code, 0.

    Args:
        argv: the arguments after `info`; none where None.

    Raises:
        UserError: an unknown argument.
    """
    parser = _Parser(
        prog="fastgpt info",
        description="Print versions, the chip, its instruction sets, and which engine each op will use, and why.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: text)")
    given = parser.parse_args(list(argv or ()))
    found = collect()
    print(json.dumps(found, indent=2) if given.json else render(found))
    return 0
