"""What a case of the GPU benchmark is made of: inputs, fastgpt's engines, torch, other libraries, and what is right in float64."""

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops

from ..variants import DTYPES, Variant, error_of

Function = Callable[..., Any]
HOPPER = "FASTGPT_CUDA_SM90"  # see fastgpt/ops/cuda_attention.py


@dataclasses.dataclass
class Made:
    """A case with its inputs: what to time, and what is right (in float64) of what `pick` takes of a result."""

    variants: list[Variant]
    expected: Callable[[], tuple[Tensor, ...]]
    pick: Callable[[Any], tuple[Tensor, ...]] = lambda result: (result,)
    error: Callable[[Tensor, Tensor], float] = error_of


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the plan."""

    op: str
    case: str
    dtype: str
    shape: tuple[int, ...]
    make: "Callable[[Kit], Made]"
    bytes_moved: int = 0
    flops: int = 0
    tokens: int = 0


class Kit:
    """Makes inputs and variants on one device; on "meta" nothing has data and nothing may run.

    Args:
        device: where.
        engines: fastgpt's, by name.
        compiles: whether torch.compile is one of the variants.
        seed: of the inputs.
    """

    def __init__(self, device: str, engines: Sequence[str], compiles: bool, seed: int) -> None:
        self.device, self.engines, self.compiles = torch.device(device), tuple(engines), compiles
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: str) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
        return torch.randn(shape, generator=self._generator, device=self.device).to(DTYPES[dtype])

    def below(self, most: int, *shape: int) -> Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        return torch.randint(most, shape, generator=self._generator, device=self.device)

    def ours(self, run: Callable[[], Any], chips: bool = False) -> list[Variant]:
        """The call on each of fastgpt's engines; one that has no such op or does not cover it is left out, and the result says so.

        `chips`: the engine `cuda` has kernels of its own for Hopper, behind a switch; there both are variants.
        """

        def on(engine: str, hopper: str | None = None) -> Callable[[], Any]:
            def forced() -> Any:
                before = os.environ.get(HOPPER)
                if hopper is not None:
                    os.environ[HOPPER] = hopper
                try:
                    with ops.use_backend(engine):
                        return run()
                finally:
                    if hopper is not None:
                        os.environ.pop(HOPPER) if before is None else os.environ.update({HOPPER: before})

            return forced

        found = []
        for engine in self.engines:
            if engine == "cuda" and chips and self._is_hopper():
                found += [(f"fastgpt cuda, sm_{chip}", on(engine, str(int(chip == 90)))) for chip in (80, 90)]
            else:
                found.append((f"fastgpt {engine}", on(engine)))
        return [Variant(name, call, ours=True, optional=True) for name, call in found]

    def _is_hopper(self) -> bool:
        return self.device.type != "cpu" and (
            self.device.type == "meta" or torch.cuda.get_device_capability(self.device) == (9, 0)
        )

    def torchs(self, function: Function, bind: "Bind") -> list[Variant]:
        """torch eager, and compiled for static shapes."""
        found = [Variant("torch eager", bind(function))]
        if self.compiles:
            found.append(Variant("torch.compile", bind(torch.compile(function, dynamic=False)), optional=True))
        return found


@dataclasses.dataclass(frozen=True)
class Bind:
    """Makes calls of functions on the same inputs: bind(f)() is f(*inputs, *rest), or with `backward` the gradients of the inputs.

    Attributes:
        inputs: tensors.
        grad: of the result, where the result is not a scalar.
        rest: further arguments.
        backward: whether gradients are asked for.
    """

    inputs: tuple[Tensor, ...]
    grad: Tensor | None = None
    rest: tuple[Any, ...] = ()
    backward: bool = False

    def __call__(self, function: Function) -> Callable[[], Any]:
        if not self.backward:
            return lambda: function(*self.inputs, *self.rest)
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        return lambda: torch.autograd.grad(function(*leaves, *self.rest), leaves, self.grad)

    def own(self, name: str, function: Function) -> Variant:
        """A variant with inputs of its own, which are written anew before each call."""
        mine = [x.detach().clone() for x in self._tensors()]
        copies = Bind(
            tuple(mine[: len(self.inputs)]), mine[-1] if self.grad is not None else None, self.rest, self.backward
        )

        def restore() -> None:
            for x, original in zip(mine, self._tensors(), strict=True):
                x.copy_(original)

        return Variant(name, copies(function), before=restore, optional=True)

    def _tensors(self) -> list[Tensor]:
        return [*self.inputs, *([] if self.grad is None else [self.grad])]


def library(name: str, module: str, function: str, bind: Bind, *more: Any, **options: Any) -> list[Variant]:
    """Another library's variant where it is installed; its function, which gets `more` and `options` besides, is looked up at the
    first call.

    Its inputs are its own: Liger-Kernel leaves gradients in the place of logits, of the halves of swiglu and of a norm's gradient.
    """
    if importlib.util.find_spec(module.split(".", 1)[0]) is None:
        return []

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, *more, **options)

    return [bind.own(name, call)]


def liger(function: str, bind: Bind, *more: Any) -> list[Variant]:
    return library("Liger-Kernel", "liger_kernel.transformers.functional", function, bind, *more)


def forward(*inputs: Tensor) -> Bind:
    return Bind(inputs)


def both(inputs: tuple[Tensor, ...], grad: Tensor | None, *rest: Any) -> Bind:
    """The result's gradients with respect to `inputs`, the first arguments; `rest` are the other ones."""
    return Bind(inputs, grad, rest, backward=True)


def exact_gradients(
    function: Function, inputs: tuple[Tensor, ...], grad: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The same in float64, by autograd through the formula."""
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
    return torch.autograd.grad(function(*leaves, *rest), leaves, None if grad is None else grad.double())
