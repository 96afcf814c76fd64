"""csrc/cuda as a C++ compiler without CUDA can read it: kernels without bodies, functions of the device only declared.

    python csrc/nvrtc/host_view.py FOLDER

writes every .cuh of csrc/cuda to FOLDER/cuda. What is left is what the host needs: argument structs, tile sizes, the choice of a
kernel and its launch. A kernel's address stands for it: its symbol's name is what NVRTC is asked to compile (driver.cpp).
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SKIPPED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|^[ \t]*#(?:\\\n|[^\n])*', re.DOTALL | re.MULTILINE
)


def _blank(text: str) -> str:
    """The text with comments, strings and the preprocessor's lines as spaces, so that places stay."""
    return SKIPPED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _closing(code: str, start: int) -> int:
    """The place after the brace that closes the one at `start`."""
    depth = 0
    for place in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing brace for the one at character {start}")


def host_view(text: str) -> str:
    """A header of csrc/cuda without the bodies of what runs on the device alone; line numbers stay.

    >>> host_view("__global__ void f(int n) { g(n); }\\n__device__ int g(int n) { return n; }")
    '__global__ void f(int n) {}\\n__device__ int g(int n) ;'
    """
    code, parts, at = _blank(text), [], 0
    for found in re.finditer(r"__global__|(__host__\s+)?__device__", code):
        if found.start() < at or found[1]:
            continue
        depth, place = 0, found.end()
        while depth > 0 or code[place] not in ";{":
            depth += {"(": 1, ")": -1}.get(code[place], 0)
            place += 1
        if code[place] == ";":
            continue
        end = _closing(code, place)
        lines = "\n" * text.count("\n", place, end)
        keeps_body = found[0] == "__global__" or re.search(
            r"\)\s*:(?!:)", code[found.end() : place]
        )  # a constructor's list
        parts += [text[at:place], ("{}" if keeps_body else ";") + lines]
        at = end
    return "".join([*parts, text[at:]])


def kernels(text: str) -> list[str]:
    """The names of the kernels that a header defines."""
    heads = re.findall(r"__global__([^;{]*)\{", _blank(text))
    return [re.findall(r"(\w+)\s*\(", re.sub(r"__launch_bounds__\s*\([^()]*\)", "", head))[0] for head in heads]


def write(folder: Path) -> list[Path]:
    """Write the headers to folder/cuda, those that are as they should be left alone; the files."""
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted((HERE.parent / "cuda").glob("*.cuh")):
        if (HERE / "include" / "cuda" / path.name).exists():  # another one stands for it
            continue
        target, text = folder / "cuda" / path.name, host_view(path.read_text())
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
        written.append(target)
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
