"""What drop-in modules do with input that the ops do not take: torch's own forward, which computes it or raises torch's own error.

And the sizes below which modules of other people's models stay torch's on the CPU: a call of an op costs 7 to 16 us with the way
through Python, one of torch's functions 3 to 6. Measured with torch 2.13 on two Zen 4 cores.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

# In numbers; what was measured below and above stands behind each.
SMALLEST = {
    "pointwise": 16384,  # swiglu of 8 x 2048 1.3 times as slow as torch's two operations, tanh 1.8 times as fast
    "rms_norm": 2048,  # transformers' six operations: 256 to 1024 numbers 1.1 times as fast alone, 0.98 within a token of a small model
    "layer": 65536,  # an attention or encoder layer of 4096 0.65 to 0.87 times as fast, of 262144 0.99 to 1.4 times
    # A linear layer's weight: read from memory 256 x 768 is 1.3 times as fast, but a Llama of 4 layers, 256 wide, whose weights stay in
    # the caches, generated 0.87 times as fast with a limit of 131072.
    "weight": 524288,
    "weight, one thread": 8388608,  # 1 row: 1 million 0.85 to 1.1 times as fast, 38 million 1.06 (4 rows 1.37); two threads 1.2 to 1.9
    "cache": 262144,  # the keys that one query reads: 25600 half as fast, 786432 1.1 times as fast
}

_size_matters = True
_log = logging.getLogger("fastgpt")


@functools.cache
def log_fallback(what: str) -> None:
    """Says once a process that torch computes `what`."""
    _log.warning("%s is computed by torch: the fastgpt op does not support it", what)


def is_small(x: torch.Tensor, what: str = "pointwise") -> bool:
    """Whether torch's function of a tensor is faster for want of numbers: `what` is a name in SMALLEST."""
    return _size_matters and x.device.type == "cpu" and x.numel() < SMALLEST[what]


def is_small_weight(weight: torch.Tensor) -> bool:
    """Whether torch's product of a few rows with a linear layer's weight is as fast, with the threads that there are."""
    return is_small(weight, "weight, one thread" if torch.get_num_threads() == 1 else "weight")


@contextlib.contextmanager
def whatever_size() -> Iterator[None]:
    """Within it nothing is small: for comparing both ways on a few numbers."""
    global _size_matters
    before, _size_matters = _size_matters, False
    try:
        yield
    finally:
        _size_matters = before


def or_torch(
    theirs: Callable[..., Any], what: str, *, quiet: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: where the op refuses its input (ValueError, TypeError), `theirs` gets the same arguments.

    So a wrong shape raises what torch raises, and what torch takes beside floating-point numbers (relu of integers) still works.
    `quiet` where that is usual and not worth a line in the log.
    """

    def wrap(ours: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(ours)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return ours(*args, **kwargs)
            except (TypeError, ValueError):
                pass
            result = theirs(*args, **kwargs)
            if not quiet:
                log_fallback(f"{what} of such input")
            return result

        return run

    return wrap
