"""Compile the CUDA kernels for every architecture and report what ptxas says of each: registers, shared memory, spills.

    python csrc/cuda/check.py [--arch 80 90a 100a] [file.cu ...]

Fails (exit code 1) on any warning, on any spill, and on ptxas's remarks C75.., which come as information and mean a missing wait or
fence of wgmma. Needs nvcc on the PATH or CUDA_HOME; no GPU.
"""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90a", "100a")
FLAGS = ["-std=c++20", "-O3", f"-I{HERE.parent}", "-Xcompiler", "-fPIC", "-Xptxas", "-v,--warn-on-spills", "-cubin"]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel; sizes in bytes, of a thread for spills, of a block for shared memory."""

    name: str
    registers: int
    shared: int
    spilled: int


def find_nvcc() -> str | None:
    """nvcc, or None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def parse(text: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of ptxas's output, and the lines that must not be there."""
    kernels, name, spilled = [], "", 0
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name, spilled = found[1], 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if "warning" not in line:
                spilled = int(found[1]) + int(found[2])
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(name, int(found[1]), int(shared[1]) if shared else 0, spilled))
            name = ""
    bad = [line.strip() for line in text.splitlines() if re.search(r"warning|error|\bC75\d\d\b", line)]
    bad += [f"{kernel.name}: {kernel.spilled} bytes spilled" for kernel in kernels if kernel.spilled]
    return kernels, bad


def compile_one(source: Path, architecture: str) -> tuple[list[Kernel], list[str]]:
    """Compile a file for one architecture; see `parse`."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [find_nvcc() or "nvcc", *FLAGS, code, str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    text = done.stdout + done.stderr
    kernels, bad = parse(text)
    if done.returncode != 0 and not bad:
        bad = [f"{' '.join(command)}: exit code {done.returncode}", *text.splitlines()[-5:]]
    return kernels, bad


def readable(names: list[str]) -> list[str]:
    """Names as C++ has them, without arguments, where c++filt is there."""
    if shutil.which("c++filt") is None or not names:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = [
        re.sub(r"^void |\((?:fastgpt::|CUtensorMap).*$|fastgpt::|cuda::", "", line) for line in done.stdout.splitlines()
    ]
    return short if len(short) == len(names) else names


def main(argv: list[str] | None = None) -> int:
    """Print the report; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels and report registers and spills.")
    parser.add_argument("files", nargs="*", type=Path, help="default: every .cu beside this script")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    given = parser.parse_args(argv)
    if find_nvcc() is None:
        print("no nvcc on the PATH (or in CUDA_HOME)", file=sys.stderr)
        return 2
    files = given.files or sorted(HERE.glob("*.cu"))
    # What is named _sm90 has instructions that no other chip has.
    jobs = [(file, arch) for file in files for arch in given.arch if "_sm90" not in file.name or arch == "90a"]
    failed = False
    print(f"{'arch':6}{'registers':>10}{'shared':>8}{'spilled':>9}  kernel")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, arch), (kernels, bad) in zip(jobs, pool.map(lambda job: compile_one(*job), jobs), strict=True):
            for kernel, name in zip(kernels, readable([kernel.name for kernel in kernels]), strict=True):
                print(f"{arch:6}{kernel.registers:>10}{kernel.shared:>8}{kernel.spilled:>9}  {name}")
            for line in bad:
                print(f"{file.name} for sm_{arch}: {line}", file=sys.stderr)
            failed |= bool(bad)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
