"""The benchmarks, and `fastgpt bench` that runs them: every op and a whole training step, against torch, timed in turns on one harness.

    fastgpt bench                       all of them; results and plots to benchmarks/results (in a checkout) or ./fastgpt-bench
    fastgpt bench softmax attention     some
    fastgpt bench --quick               a few calls of everything, to see that it runs; writes nothing unless --out is given

`bench_<name>.py` is one benchmark, harness.py and variants.py how all are timed, record.py what is written, plot.py how it is drawn,
raw.py fastgpt's kernels on preallocated results, plain_gpt.py the model in plain torch that the training step is compared with.

The folder is both `benchmarks` in a checkout and `fastgpt.benchmarks` where installed, so its modules import each other relatively.
"""

import argparse
import ast
import difflib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

FOLDER = Path(__file__).parent
_CHECKOUT = FOLDER.resolve().parent
if __name__ == "benchmarks" and not any((_CHECKOUT / "fastgpt").glob("_*.so")):
    # `python -m benchmarks.x` in a checkout puts the checkout first, whose folder fastgpt lacks the compiled modules: the installed
    # package is meant, where there is one.
    _last = [place for place in sys.path if Path(place or ".").resolve() == _CHECKOUT]
    sys.path[:] = [place for place in sys.path if place not in _last] + _last

from fastgpt.errors import UserError  # noqa: E402

_NEEDS = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}


def names() -> dict[str, str]:
    """Every benchmark's name and what it is, from the first line of its file.

    A file without a `bench_*` function is a script of its own and not listed.
    """
    found = {}
    for file in sorted(FOLDER.glob("bench_*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name.startswith("bench_") for node in tree.body):
            text = ast.get_docstring(tree) or ""
            found[file.stem.removeprefix("bench_")] = text.partition("\n")[0]
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastgpt bench",
        description="Time fastgpt against torch on this machine. About ten minutes for everything on two quiet cores.",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all; see --list)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and rounds, to see that it runs; writes only with --out"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for results (default: benchmarks/results in a checkout, else ./fastgpt-bench)",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument(
        "--plot", action="store_true", help="only draw the results that stand in --out (a run draws its own)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """`fastgpt bench`; see the module's docstring.

    Args:
        argv: the arguments after `bench`.

    Returns:
        0, or 1 where a benchmark failed or its variants disagreed, 2 where it was interrupted.

    Raises:
        UserError: a wrong argument, or pytest or pytest-benchmark is not installed.
    """
    given = _parser().parse_args(list(argv))
    known = names()
    for name in given.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown benchmark {name!r}{hint}; there are: {', '.join(known)}")
    if given.threads is not None and given.threads < 1:
        raise UserError(f"--threads is {given.threads}; accepted is 1 or more")
    if given.list:
        for name, text in known.items():
            print(f"{name:16}{text}")
        return 0
    missing = [package for module, package in _NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the benchmarks need {' and '.join(missing)}: pip install 'fastgpt-kernels[bench]'")

    from . import record

    out = given.out
    if out is None and not (given.quick and not given.plot):
        out = record.default_out()
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is not a folder")
    if given.plot:
        return _plot(out, given.names)
    return _run(given.names or list(known), out, given.quick, given.threads, argv)


def _plot(out: Path, chosen: Sequence[str]) -> int:
    from . import plot, record

    files = [file for file in record.results(out) if not chosen or file.stem in chosen]
    if not files:
        raise UserError(
            f"{out}: no results of {', '.join(chosen) or 'any benchmark'} to draw; run `fastgpt bench` first"
        )
    for file in files:
        try:
            print(plot.draw(file))
        except ValueError as error:
            raise UserError(str(error)) from error
    return 0


def _run(chosen: Sequence[str], out: Path | None, quick: bool, threads: int | None, argv: Sequence[str]) -> int:
    import pytest
    import torch

    from .harness import Plugin, Settings

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    plugin = Plugin(Settings(quick=quick, out=out, command=shlex.join(["fastgpt", "bench", *argv])))
    options = [
        f"--rootdir={FOLDER}",
        f"--config-file={os.devnull}",  # not the configuration of whatever project the current folder belongs to
        "--import-mode=importlib",
        "--override-ini=python_functions=bench_*",
        "--capture=no",
        "--show-capture=no",  # torch.compile logs pages
        "--tb=short",
        "--quiet",
        "--no-header",
        "--disable-warnings",
        "-p", "no:cacheprovider",
        "-p", "benchmark",
        "--benchmark-columns=median,min,iqr,rounds,iterations",
        "--benchmark-sort=min",
    ]  # fmt: skip
    try:
        code = pytest.main([*options, *(str(FOLDER / f"bench_{name}.py") for name in chosen)], plugins=[plugin])
    finally:
        torch.set_num_threads(before)
    for file in plugin.written:
        print(file)
    for benchmark, failures in plugin.failed.items():
        for case, why in failures.items():
            print(f"{benchmark} {case} failed: {why}", file=sys.stderr)
    return int(code)
