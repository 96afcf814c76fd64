"""How much of the work a program takes on: sizes by architecture, and triton.autotune where it is asked for.

`launch` starts a kernel with the tile its launcher chose. With FASTGPT_AUTOTUNE=1 in the environment it runs each of the launcher's
candidates instead, the first time that a kernel meets new sizes, options or dtypes, and from then on starts the fastest. Triton keeps
the timings on disk beside its compiled kernels (TRITON_CACHE_DIR), so that the next process measures nothing. That is for training,
whose sizes repeat; text generation, with a new length at every step, does without.

Candidates that need more shared memory than there is, or that do not compile, count as infinitely slow. Kernels that change what they
read (the optimizer's step, logits that become their own gradient, sums into an existing tensor) cannot be run twice, and have none.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
from torch import Tensor

from fastgpt.kernels.launch import architecture

__all__ = ["Sizes", "asked", "candidates", "launch", "launch_rows", "sizes", "tile", "warps"]

Tile = Mapping[str, int]  # a kernel's BLOCK_... constants, num_warps, num_stages


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a program of a memory-bound kernel takes on."""

    elements: int  # of an element-wise kernel, and of short rows together
    step: int  # classes a step of cross_entropy


# A multiprocessor has to have bytes per second times latency on their way: about 11 KB on an A100 (2.0 TB/s, 108 of them, 0.6 us), 18
# on an H100 (3.35, 132, 0.7), 38 on a B200 (8.0, 148, 0.7). 2,048 resident threads with 16 elements of two bytes are 64 KB, which
# leaves room for programs that are between their loads; on sm_100 that room is made with twice the elements a thread. From these
# numbers, not measured.
SIZES = {80: Sizes(2048, 4096), 90: Sizes(2048, 4096), 100: Sizes(4096, 8192)}


def sizes(x: Tensor) -> Sizes:
    """The sizes of the newest known architecture that is not newer than the tensor's device."""
    here = architecture(x)
    return SIZES[max((known for known in SIZES if known <= here), default=min(SIZES))]


def warps(x: Tensor, elements: int) -> int:
    """Warps of a memory-bound program of so many elements: 16 to 32 a thread."""
    return 4 if elements <= sizes(x).elements else 8 if elements <= 8192 else 16


def tile(x: Tensor, rows: int, cols: int, most: int = 8192) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) that holds whole rows: BLOCK_N >= cols, and as many rows as a program's elements, but no more than `most`, and
    the work allow."""
    block_n = triton.next_power_of_2(max(cols, 1))
    block_m = min(max(min(sizes(x).elements, most) // block_n, 1), triton.next_power_of_2(max(rows, 1)))
    return block_m, block_n


def asked() -> bool:
    """Whether the environment asks for measuring: FASTGPT_AUTOTUNE is set, and not to 0."""
    return os.environ.get("FASTGPT_AUTOTUNE", "0") not in ("", "0")


def candidates(**choices: Sequence[int]) -> tuple[dict[str, int], ...]:
    """Every combination: candidates(BLOCK=(1024, 2048), num_warps=(4, 8)) are four."""
    made: list[dict[str, int]] = [{}]
    for name, values in choices.items():
        made = [{**tile, name: value} for tile in made for value in values]
    return tuple(made)


@functools.cache
def _tuner(kernel: Any, key: tuple[str, ...], tiles: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    options = ("num_warps", "num_stages", "maxnreg")
    configs = [
        triton.Config({k: v for k, v in tile if k not in options}, **{k: v for k, v in tile if k in options})
        for tile in tiles
    ]
    return triton.autotune(configs, key=list(key), cache_results=True)(kernel)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    args: tuple[Any, ...],
    tile: Tile,
    choices: Sequence[Tile] = (),
    key: tuple[str, ...] = (),
    **constants: Any,
) -> None:
    """Start a kernel with its tile, or with the fastest of the choices where they are asked for.

    Args:
        grid: the programs, from the tile.
        args: the kernel's arguments before the tile's constants.
        tile: BLOCK_... constants, num_warps, num_stages, maxnreg.
        choices: other tiles; none where the kernel cannot be run twice.
        key: the kernel's arguments and constants whose change asks for a new measurement, beside the dtypes.
        constants: the kernel's other constants.
    """
    if choices and asked():
        tiles = tuple(tuple(sorted(one.items())) for one in (tile, *(one for one in choices if one != tile)))
        _tuner(kernel, key, tiles)[grid](*args, **constants)
    else:
        kernel[grid(tile)](*args, **tile, **constants)


def launch_rows(
    kernel: Any, args: tuple[Any, ...], rows: int, cols: int, key: tuple[str, ...], arrays: int = 1
) -> None:
    """Start a kernel that holds BLOCK_M whole rows of BLOCK_N columns in registers.

    Args:
        args: the kernel's arguments before BLOCK_M and BLOCK_N, a tensor first.
        key: as of `launch`.
        arrays: how many such tiles it holds at a time, for the number of warps.
    """
    block_m, block_n = tile(args[0], rows, cols)
    chosen = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps(args[0], block_m * block_n * arrays)}
    choices = candidates(BLOCK_M=(max(block_m // 2, 1), block_m, 2 * block_m), BLOCK_N=(block_n,), num_warps=(4, 8, 16))
    launch(kernel, lambda tile: (triton.cdiv(rows, tile["BLOCK_M"]),), args, chosen, choices, key)
