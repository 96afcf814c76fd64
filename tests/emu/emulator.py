"""Call a kernel on the emulator: torch tensors in, the same tensors written back, an EmulationError where it broke a rule."""

import ctypes
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from emu.build import Bug, build

SCHEDULES = ("round-robin", "random", "warp priority")
COMPLETIONS = ("eager", "lazy", "random")
MODES = [(s, c) for s in SCHEDULES for c in COMPLETIONS]
Argument = torch.Tensor | int | float | None


class EmulationError(RuntimeError):
    """What a kernel did wrong: block, thread, and what; or the report of a sanitizer."""


class _Value(ctypes.Union):
    _fields_ = [("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("number", ctypes.c_double)]


def _bytes(x: torch.Tensor) -> bytes:
    if not x.is_contiguous():
        raise ValueError("x: expected a contiguous tensor")
    return bytes(x.reshape(-1).view(torch.uint8).numpy()) if x.numel() else b""


def _write_back(x: torch.Tensor, data: bytes) -> None:
    if data:
        x.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


class Emulator:
    """The kernels of one binding file, with its planted bugs.

    >>> emulator = Emulator("rows", bugs=[Bug("no barrier", "rows.cuh", "__syncthreads();", ";")])
    >>> emulator("row_softmax", x, y, 3, 97, mode=("random", "lazy"), seed=1)
    >>> emulator("row_softmax", x, y, 3, 97, bug="no barrier")  # raises, or gives what is wrong
    """

    def __init__(self, binding: str, bugs: Sequence[Bug] = ()) -> None:
        self.binding, self.bugs = binding, list(bugs)
        self._library = ctypes.CDLL(str(build(binding, self.bugs)))
        self._library.emu_allocate.restype = ctypes.c_void_p
        self._library.emu_allocate.argtypes = [ctypes.c_size_t]
        self._library.emu_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.emu_configure.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]

    def _number(self, bug: str | None) -> int:
        return 0 if bug is None else 1 + [b.name for b in self.bugs].index(bug)

    def __call__(
        self,
        name: str,
        *arguments: Argument,
        mode: tuple[str, str] = ("round-robin", "eager"),
        seed: int = 0,
        bug: str | None = None,
    ) -> None:
        """Run a binding; every tensor lies in memory of its own between guard pages, and is written back."""
        values = (_Value * len(arguments))()
        memory: list[tuple[torch.Tensor, int, int]] = []
        placed: dict[int, int] = {}
        for value, argument in zip(values, arguments, strict=True):
            if id(argument) in placed:  # the same tensor again: what is read there is overwritten
                value.pointer = placed[id(argument)]
            elif isinstance(argument, torch.Tensor):
                data = _bytes(argument)
                value.pointer = self._library.emu_allocate(len(data))
                ctypes.memmove(value.pointer, data, len(data))
                memory.append((argument, value.pointer, len(data)))
                placed[id(argument)] = value.pointer
            elif isinstance(argument, float):
                value.number = argument
            elif argument is None:
                value.pointer = None
            else:
                value.integer = argument
        function = self._library[name]
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int]
        schedule, completion = SCHEDULES.index(mode[0]), COMPLETIONS.index(mode[1])
        self._library.emu_configure(schedule, completion, seed, self._number(bug))
        error = function(values, len(arguments))
        intact = True
        for tensor, pointer, length in memory:
            _write_back(tensor, ctypes.string_at(pointer, length))
            intact &= bool(self._library.emu_free(pointer, length))
        if error is not None:
            raise EmulationError(error.decode())
        if not intact:
            raise EmulationError("written beside an argument's memory")

    def sanitized(
        self,
        sanitizer: str,
        name: str,
        *arguments: Argument,
        mode: tuple[str, str] = ("round-robin", "eager"),
        seed: int = 0,
        bug: str | None = None,
    ) -> None:
        """The same in a process of its own under a sanitizer, "thread" or "address"; raises with its report."""
        program = build(self.binding, self.bugs, sanitizer)
        schedule, completion = SCHEDULES.index(mode[0]), COMPLETIONS.index(mode[1])
        parts = [f"{name} {schedule} {completion} {seed} {self._number(bug)} {len(arguments)}\n".encode()]
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                data = _bytes(argument)
                parts += [f"p {len(data)}\n".encode(), data]
            elif argument is None:
                parts.append(b"n\n")
            else:
                parts.append(f"{'d' if isinstance(argument, float) else 'i'} {argument}\n".encode())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "call"
            path.write_bytes(b"".join(parts))
            options = {"TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0", "ASAN_OPTIONS": "detect_leaks=0"}
            done = subprocess.run(
                ["setarch", "-R", str(program), str(path)], capture_output=True, text=True, env=options, timeout=100
            )
            if done.returncode != 0:
                raise EmulationError(f"{done.stdout}{done.stderr}"[:6000] or f"exit status {done.returncode}")
            data = Path(f"{path}.out").read_bytes()
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                length = argument.numel() * argument.element_size()
                _write_back(argument, data[:length])
                data = data[length:]
