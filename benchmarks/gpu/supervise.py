"""The run in a process of its own, which another one watches, so that what a kernel does to a process costs no other's results.

An illegal address ends the use of the device for the process that did it, a crash ends the process, a barrier that nobody reaches ends
nothing at all. The worker writes what it is about to do to a file, the state; where it ends badly or says nothing for STALL_S, it is
started again after the variant, or the case, that it was at. Results are in the state, too, so that nothing is measured twice.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STALL_S = 150.0  # a first torch.compile of GPT-2 takes more than a minute
START_S = 120.0  # until a worker's first word: imports
MAX_STARTS = 8
POLL_S = 0.2


class DeviceLostError(BaseException):
    """The device answers this process no more; the message says after what. Not an Exception: no variant's."""


class State:
    """What a worker has done and is at; written whole at every change.

    Attributes:
        case: how many cases are behind it.
        at: the variant that is run or the part of a case, None between cases.
        ended: {case's label: {variant, or "" for the whole case: how it ended the process}}.
        results, ceilings: of benchmarks.gpu.__main__.Run.
        code: the exit code of a run that came to its end.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.case, self.label, self.at = 0, "", ""
        self.ended: dict[str, dict[str, str]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.ceilings: dict[str, float] = {}
        self.why: str | None = None
        self.code: int | None = None
        if file is not None and file.is_file():
            for name, value in json.loads(file.read_text()).items():
                setattr(self, name, value)

    def write(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        if self.file is None:
            return
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps({name: value for name, value in vars(self).items() if name != "file"}))
        os.replace(draft, self.file)

    def blame(self, why: str) -> None:
        """Write down that what the worker was at ended it; a case has no second try where none of its variants is to blame."""
        self.ended.setdefault(self.label, {})[self.at] = self.why or why
        self.write(why=None)


def supervise(command: Sequence[str], file: Path, seconds: float, stall_s: float = STALL_S) -> int:
    """Run `command` (which gets `--state FILE --seconds S` besides) until a run has come to its end or the time is over.

    Args:
        command: starts a worker.
        file: its state.
        seconds: for all workers together.
        stall_s: how long a worker may write nothing.

    Returns:
        The worker's own exit code, or 3 where there was none in time.
    """
    end = time.monotonic() + seconds
    State(file).write()
    for _ in range(MAX_STARTS):
        left = end - time.monotonic()
        if left <= 0:
            break
        worker = subprocess.Popen([*command, "--state", str(file), "--seconds", f"{left:.0f}"], process_group=0)
        try:
            why = _watch(worker, file, end, stall_s)
        finally:
            _kill(worker)
        state = State(file)
        if state.code is not None:
            return state.code
        if time.monotonic() >= end:
            break
        place = " ".join(filter(None, [state.label or "the start", state.at]))
        again = state.at in state.ended.get(state.label, {})
        print(
            f"{place}: {state.why or why}{'' if again else '; the run goes on after it'}", file=sys.stderr, flush=True
        )
        if again:
            return 3
        state.blame(why)
    print("stopped: the time is over, or too many processes ended", file=sys.stderr, flush=True)
    return 3


def _watch(worker: subprocess.Popen[bytes], file: Path, end: float, stall_s: float) -> str:
    """How the worker ended: by itself, or because it has to."""
    seen, since, limit = file.stat().st_mtime_ns, time.monotonic(), max(stall_s, START_S)
    while worker.poll() is None:
        time.sleep(POLL_S)
        now, written = time.monotonic(), file.stat().st_mtime_ns
        if written != seen:
            seen, since, limit = written, now, stall_s
        if now >= end:
            return "the time was over"
        if now - since > limit:
            return f"nothing happened for {limit:.0f} s"
    code = worker.returncode
    return (
        f"the process ended by signal {signal.Signals(-code).name}"
        if code < 0
        else f"the process ended with code {code}"
    )


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and what it started (torch.compile has processes of its own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
