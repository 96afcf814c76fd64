"""The engine `cuda` with the emulation under it: its wrappers on CPU tensors, so that routing and kernel are tested as one.

`on_emulator` puts the emulation in place of fastgpt._cuda. Results that a kernel leaves unwritten are NaN (torch fills new memory), and
where `guarded`, each tensor a wrapper hands over lies between guard pages; else kernels get the tensors' own addresses, which keeps
their alignment.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from emu.emulator import MODES, Emulator
from fastgpt.ops import backend, cuda
from fastgpt.ops.backend import NotCovered


class Wrappers:
    """All bindings together, under the names and arguments of fastgpt._cuda: takes an Emulator's place in `on_emulator`."""

    def __init__(self) -> None:
        self._emulators: dict[str, Emulator] = {}

    def __call__(self, name: str, *args: Any, **run: Any) -> None:
        binding, function, arguments = _bound(name, args)
        if binding not in self._emulators:
            self._emulators[binding] = Emulator(binding)
        self._emulators[binding](function, *arguments, **run)


def _bound(name: str, args: tuple[Any, ...]) -> tuple[str, str, tuple[Any, ...]]:
    """The binding file of a launcher, its function there, and the arguments in that function's order."""
    if name == "softmax":
        return "softmax", name, (*args[:5], *args[5], *args[6:])
    if name == "activation":
        kind, code, x, y, n = args
        return "pointwise", name, (code, kind, x, None, y, n)
    if name == "activation_backward":
        kind, code, *rest = args
        return "pointwise", "activation", (code, kind, *rest)
    if name == "dropout":
        return "pointwise", name, (*args, 0)
    if name == "swiglu":
        kind, code, gate, _, up, _, y, rows, cols = args
        return "swiglu", name, (code, kind, gate, up, None, y, None, rows, cols)
    if name == "swiglu_backward":
        kind, code, grad, gate, _, up, _, dgate, dup, _, rows, cols = args
        return "swiglu", "swiglu", (code, kind, gate, up, grad, dgate, dup, rows, cols)
    if name in ("norm", "norm_backward"):
        return "norm", name, args
    if name in ("count_targets", "cross_entropy", "cross_entropy_backward", "scale_rows"):
        return "cross_entropy", name, args
    return "memory", name, args


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextlib.contextmanager
def on_emulator(
    emulator: Emulator | Wrappers,
    *,
    mode: tuple[str, str] = MODES[0],
    seed: int = 0,
    bug: str | None = None,
    guarded: bool = True,
) -> Iterator[None]:
    """Launches of fastgpt.ops.cuda and its kin go to the emulation, tensors on the CPU are taken."""

    def launch(name: str, device: torch.device, *args: Any) -> None:
        given = [x.data_ptr() if isinstance(x, Tensor) and not guarded else x for x in args]
        emulator(name, *given, mode=mode, seed=seed, bug=bug)

    def check(*tensors: Tensor | None) -> None:
        devices = {x.device.type for x in tensors if x is not None}
        if devices != {"cpu"}:
            raise NotCovered(f"tensors on {devices}")

    with mock.patch.object(cuda, "_launch", launch), mock.patch.object(cuda, "_check", check), poisoned():
        yield


def implementation(op: str) -> Callable[..., Any]:
    """The engine's implementation of an op."""
    return backend._implementations[op]["cuda"]
