"""Calls of every memory-bound op of the engine `cuda`, the same ones for the emulation and for a GPU, held to the formula."""

from collections.abc import Callable
from typing import Any

import torch
from parity import assert_parity, random
from torch import Tensor

from fastgpt.ops import backend, reference
from fastgpt.ops.bias_activation import KINDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {"tiny": (3, 24), "odd": (5, 97), "odder": (4, 113), "long": (2, 1025)}  # rows, columns
REAL = {"gpt2": (4096, 768), "wide": (2048, 3072), "vocabulary": (256, 50304), "largest": (16, 262144)}


def arguments(op: str, rows: int, cols: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of an op's implementation, on the CPU."""

    def matrix(seed: int, like: torch.dtype = dtype) -> Tensor:
        return random(rows, cols, dtype=like, seed=seed)

    x, grad, weight, bias = matrix(0), matrix(1), random(cols, dtype=dtype, seed=2), random(cols, dtype=dtype, seed=3)
    target = torch.randint(cols, (rows,), generator=torch.Generator().manual_seed(4))
    target[0] = -100
    options = (-100, "mean", 0.1, 1e-3)
    mean, rstd = (statistic.float() for statistic in reference.layer_norm(x, None, None, 1e-5)[1:])
    angles = random(rows, cols // 4, seed=5)
    ids = torch.randint(rows, (2 * rows,), generator=torch.Generator().manual_seed(6))
    by_op: dict[str, Callable[[], tuple[Any, ...]]] = {
        "softmax": lambda: (x, None, 0.5, False),
        "softmax_backward": lambda: (grad, reference.softmax(x, None, 0.5, False), 0.5),
        "log_softmax": lambda: (x,),
        "log_softmax_backward": lambda: (grad, reference.log_softmax(x)),
        "dropout": lambda: (x, grad, torch.tensor(7), 0.1),
        "layer_norm": lambda: (x, weight, bias, 1e-5),
        "layer_norm_backward": lambda: (grad, x, weight, mean, rstd, True),
        "rms_norm": lambda: (x, weight, 1e-5),
        "rms_norm_backward": lambda: (grad, x, weight, reference.rms_norm(x, None, 1e-5)[1], True),
        "add_layer_norm": lambda: (x, grad, weight, bias, 1e-5),
        "add_layer_norm_backward": lambda: (grad, matrix(8), x, weight, mean, rstd, True, False),
        "add_rms_norm": lambda: (x, grad, weight, 1e-5),
        "add_rms_norm_backward": lambda: (grad, matrix(8), x, weight, reference.rms_norm(x, None, 1e-5)[1], True, False),
        "cross_entropy": lambda: (x, target, *options),
        "cross_entropy_backward": lambda: (torch.tensor(0.7), x, target, reference.cross_entropy(x, target, *options)[1], *options),
        "cross_entropy_inplace": lambda: (x, target, *options),
        "cross_entropy_inplace_backward": lambda: (x, random(rows, seed=9)),
        "linear_cross_entropy": lambda: (x, random(61, cols, dtype=dtype, seed=9), target % 61, -100, "mean", 0.0, dtype, True),
        "embedding": lambda: (ids, x, -1, False),
        "embedding_backward": lambda: (random(2 * rows, cols, dtype=dtype), ids, rows, 1),
        "embedding_accumulate_backward": lambda: (x, random(2 * rows, cols, dtype=dtype), ids, -1),
        "rope": lambda: (x.view(1, rows, 1, cols).transpose(1, 2), angles.cos(), angles.sin(), False, False),
        "grad_norm": lambda: ([x, grad],),
        "adamw": lambda: (
            [matrix(0, torch.float32)], [matrix(1, torch.float32)], [matrix(2, torch.float32)], [matrix(3, torch.float32).abs()],
            [0.1], 1e-2, 0.9, 0.95, 1e-8, 0.5, 3, [], True,
        ),
        "swiglu": lambda: (x, grad),
        "swiglu_backward": lambda: (grad, x, matrix(8)),
        "geglu": lambda: (x, grad, "tanh"),
        "geglu_backward": lambda: (grad, x, matrix(8), "none"),
    }  # fmt: skip
    if op in by_op:
        return by_op[op]()
    name, _, kind = op.partition(":")
    if not name.startswith("bias_activation"):  # relu, gelu:tanh, gelu_backward:tanh and the like
        forward, options = name.removesuffix("_backward"), (kind,) if kind else ()
        kept = getattr(reference, forward)(x) if forward in reference.KEEPS_RESULT else x
        return (x, *options) if name == forward else (grad, kept, *options)
    kept = reference.bias_activation(x, bias, kind) if kind in reference.KEEPS_RESULT else x
    return (x, bias, kind) if name == "bias_activation" else (grad, kept, bias, kind, True)


OPS = [
    "softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "dropout", "layer_norm", "layer_norm_backward", "rms_norm",
    "rms_norm_backward", "add_layer_norm", "add_layer_norm_backward", "add_rms_norm", "add_rms_norm_backward", "cross_entropy",
    "cross_entropy_backward", "cross_entropy_inplace", "cross_entropy_inplace_backward", "linear_cross_entropy", "embedding",
    "embedding_backward", "embedding_accumulate_backward", "rope", "grad_norm", "adamw", "swiglu", "swiglu_backward", "geglu",
    "geglu_backward", *(f"bias_activation{back}:{kind}" for kind in KINDS for back in ("", "_backward")),
    *(f"{name}{back}" for name in ("relu", "sigmoid", "tanh", "silu") for back in ("", "_backward")),
    *(f"gelu{back}:{approximate}" for approximate in ("none", "tanh") for back in ("", "_backward")),
]  # fmt: skip


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a result or of arguments, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors_of(part)] if isinstance(value, (tuple, list)) else []


def moved(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(moved(x, change) for x in value) if isinstance(value, (tuple, list)) else value


def call(op: str, engine: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Results, and the arguments as they are afterwards (some ops write to them), on the CPU."""
    result = backend._implementations[op.partition(":")[0]][engine](*args)
    return [x.cpu() for x in [*tensors_of(result), *tensors_of(args)]]


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments for the exact result: in float64."""
    changed = moved(args, lambda x: x.double() if x.is_floating_point() else x.clone())
    return tuple(torch.float64 if isinstance(x, torch.dtype) else x for x in changed)


def check(op: str, ours: list[Tensor], args: tuple[Any, ...]) -> None:
    """Hold an engine's results to the rule."""
    theirs = call(op, "reference", moved(args, Tensor.clone))
    exact = call(op, "reference", wide(args))
    assert len(ours) == len(theirs) == len(exact)
    for i, (mine, torchs, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        if mine.is_floating_point():
            assert_parity(mine, torchs, right, f"{op} result {i}")
        else:
            assert torch.equal(mine, torchs)
