"""Registration of ops and the choice of engine.

An op is a formula (reference/) with several engines. Each is registered once in the torch namespace `fastgpt` by `define`, with its
schema, a fake implementation, an autograd rule and one implementation an engine. A call goes

    public function -> torch.ops.fastgpt.<op> -> the first engine of the device that covers the input

and, where nothing but the engine would look at it (plain tensors, no mode, compiler or profiler), past torch's dispatcher: see `Op`.

Engines in order: on CPU tensors `cpu` (C++ SIMD), then `reference` (the formula in torch); on CUDA tensors `cuda` (C++ kernels), then
`triton`, then `reference`; on every other device `reference`. A kernel of `cuda` that has never run on a GPU is not chosen unless it is
asked for: see fastgpt/ops/cuda.py. `triton` runs on CPU tensors too, where it is forced and TRITON_INTERPRET=1 is set.
`FASTGPT_BACKEND=<engine>`, `set_backend` or the context `use_backend` force one: an engine that is forced and not there, or that does
not cover the input, raises. Without force an input that an engine does not cover goes to the next one, and this is logged once.
"""

import contextlib
import difflib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

logger = logging.getLogger("fastgpt")

ENGINES = ("cuda", "triton", "cpu", "reference")
_ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_ORDER_ELSEWHERE: tuple[str, ...] = ("reference",)
_KEYS = ("CPU", "CUDA", "XPU", "MPS")
_PLAIN = (torch.Tensor, torch.nn.Parameter)

LIBRARY = torch.library.Library("fastgpt", "DEF")

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_logged: set[tuple[str, str, str]] = set()
_forced: str | None = None


class NotCovered(Exception):
    """Raised by an engine's implementation before it computes anything: this input is not for it; the message says why."""


class EngineUnavailableError(RuntimeError):
    """An engine that was forced cannot run here; the message says why."""


@functools.cache
def unavailable(engine: str) -> str | None:
    """Why an engine cannot run in this process, or None where it can."""
    if engine == "cpu":
        try:
            importlib.import_module("fastgpt.ops.cpu")
        except (ImportError, ValueError) as error:
            return f"the extension fastgpt._cpu does not load: {error}"
    if engine == "cuda":
        from fastgpt.ops import cuda

        return cuda.unavailable()
    if engine == "triton":
        from fastgpt.ops import triton

        return triton.unavailable()
    return None


def _held_back(op: str, engine: str) -> str | None:
    """Why an engine that is there and has the op is not chosen for it without force, or None."""
    if engine != "cuda":
        return None
    from fastgpt.ops import cuda

    return cuda.held_back(op)


def set_backend(name: str | None) -> None:
    """Force one engine for every op of this process, or none (None or "auto").

    Raises:
        ValueError: an unknown engine.
        EngineUnavailableError: the engine cannot run here.
    """
    global _forced
    if name in (None, "", "auto"):
        _forced = None
        return
    if name not in ENGINES:
        near = difflib.get_close_matches(str(name), ENGINES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend: got {name!r}, expected one of auto, {', '.join(ENGINES)}{hint}")
    if reason := unavailable(name):
        raise EngineUnavailableError(f"backend {name!r} is forced but not available: {reason}")
    _forced = name


def get_backend() -> str:
    """The forced engine, or "auto"."""
    return _forced or "auto"


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force an engine inside a `with` block; see `set_backend`."""
    global _forced
    before = _forced
    set_backend(name)
    try:
        yield
    finally:
        _forced = before


def engine_of(op: str, device: str = "cpu") -> tuple[str, dict[str, str]]:
    """The engine that an op uses first on a device type, and for each engine before it why it is not used."""
    if _forced is not None:
        return _forced, {engine: f"{_forced} is forced" for engine in ENGINES if engine != _forced}
    refused: dict[str, str] = {}
    for engine in _ORDER.get(device, _ORDER_ELSEWHERE):
        if engine not in _implementations[op]:
            refused[engine] = "has no such op"
        elif reason := unavailable(engine) or _held_back(op, engine):
            refused[engine] = reason
        else:
            return engine, refused
    raise EngineUnavailableError(f"{op}: no engine runs on {device}: {refused}")


def op_names() -> list[str]:
    """The ops with a public function (their backward ops left out), sorted."""
    return sorted(name for name in _implementations if not name.endswith("_backward"))


def implement(op: str, engine: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function of the op's schema as its implementation by an engine."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[engine] = function
        return function

    return register


def _run(op: str, *args: Any, **kwargs: Any) -> Any:
    """Call the first engine that covers the input; the device is that of the first argument (or of its first tensor)."""
    table = _implementations[op]
    if _forced is not None:
        if _forced not in table:
            raise EngineUnavailableError(f"{op}: backend {_forced!r} is forced but has no such op")
        try:
            return table[_forced](*args, **kwargs)
        except NotCovered as reason:
            raise NotImplementedError(
                f"{op}: backend {_forced!r} is forced but does not cover this: {reason}"
            ) from None
    first = args[0][0] if isinstance(args[0], list) else args[0]
    for engine in _ORDER.get(first.device.type, _ORDER_ELSEWHERE):
        implementation = table.get(engine)
        if implementation is None or unavailable(engine) or _held_back(op, engine):
            continue
        try:
            return implementation(*args, **kwargs)
        except NotCovered as reason:
            if (op, engine, str(reason)) not in _logged:
                _logged.add((op, engine, str(reason)))
                logger.info("%s: engine %s does not cover this input (%s); the next one takes it", op, engine, reason)
    raise NotImplementedError(f"{op}: no engine covers this input")


class Op:
    """A registered op, ready to call.

    The way through torch's dispatcher into Python and back is more than half of a small call (softmax of 8 x 16, forward and backward:
    129 us through it, 60 past it, where an empty autograd.Function takes 50). A call that only the engine will see goes to the autograd
    rule and to the engine itself; every other (tensor subclasses, modes, transforms, the compiler, the profiler, autocast) goes through
    the dispatcher. Who calls an op that writes to its arguments increments their versions: the dispatcher is not always there to do it.
    """

    def __init__(
        self, name: str, overload: torch._ops.OpOverload, rule: type[torch.autograd.Function] | None, autocast: bool
    ) -> None:
        self.name = name
        self.overload = overload
        self.rule = rule
        self.autocast = autocast

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _only_the_engine_looks(args, self.autocast):
            return self.overload(*args)
        if self.rule is not None and _needs_gradient(args):
            return self.rule.apply(*args)
        return _run(self.name, *args)


def _only_the_engine_looks(args: tuple[Any, ...], autocast: bool) -> bool:
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    first = None
    for arg in args:
        for x in arg if type(arg) is list else (arg,) if isinstance(arg, torch.Tensor) else ():
            if type(x) in _PLAIN:
                if x.layout is not torch.strided or x.is_meta or x.is_neg():
                    return False
                first = x if first is None else first
            elif isinstance(x, torch.Tensor):
                return False
    return first is not None and not (autocast and torch.is_autocast_enabled(first.device.type))


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    autograd: type[torch.autograd.Function] | None = None,
    autocast: bool = False,
) -> Op:
    """Register one op and return it, ready to call.

    Args:
        schema: "name(Tensor x, ...) -> Tensor" in torch's schema language; the first argument is a tensor or a list of them.
        fake: shapes and dtypes of the result, for torch.compile; takes and returns tensors without data.
        reference: the formula, on any device and dtype.
        cpu: the C++ SIMD engine's implementation; raises NotCovered for what it does not take.
        autograd: an autograd.Function whose `forward(ctx, *args)` calls the returned op; None for ops without a gradient.
        autocast: cast floating tensors to the autocast dtype, as torch does for matrix products.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    implement(name, "reference")(reference)
    if cpu is not None:
        implement(name, "cpu")(cpu)
    run = functools.partial(_run, name)
    for key in _KEYS:
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fastgpt::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.fastgpt, name).default
    op = Op(name, overload, autograd, autocast)
    if autograd is not None:
        LIBRARY.impl(name, functools.partial(_differentiate, autograd, op), "Autograd")
    if autocast:
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, functools.partial(_autocast, overload, key), f"Autocast{key}")
    return op


def _differentiate(function: type[torch.autograd.Function], op: Op, *args: Any) -> Any:
    return function.apply(*args) if _needs_gradient(args) else below_autograd(op, *args)


def below_autograd(op: Op, *args: Any) -> Any:
    """Call an op past its autograd rule; for the `forward` of that rule."""
    if _only_the_engine_looks(args, autocast=False):
        return _run(op.name, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload(*args)


def _autocast(op: torch._ops.OpOverload, key: str, *args: Any) -> Any:
    device = key.lower()
    dtype = torch.get_autocast_dtype(device)

    def cast(arg: Any) -> Any:
        is_half_able = isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
        return arg.to(dtype) if is_half_able else arg

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))):
        return op(*(cast(arg) for arg in args))


def start() -> None:
    """Apply FASTGPT_BACKEND; called once when fastgpt.ops has registered its ops."""
    engine = ("cuda", "cuda_norm", "cuda_cross_entropy", "cuda_bias_activation", "cuda_adamw", "cuda_embedding")
    for module in (*engine, "cuda_attention"):  # registers the engine; the kernels are loaded at its first use
        importlib.import_module(f"fastgpt.ops.{module}")
    importlib.import_module("fastgpt.ops.triton")  # registers the engine; triton itself is imported at its first use
    set_backend(os.environ.get("FASTGPT_BACKEND"))
