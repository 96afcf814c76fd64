"""The engine `triton` without a GPU: its tests in Triton's interpreter, its ahead-of-time compile, and why it is not available."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FILES = sorted(path.stem.removeprefix("test_triton_") for path in HERE.glob("test_triton_*.py"))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this process's import path and without a GPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("FASTGPT_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-P", *command],
        env=environment | variables,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )


@needs_triton
@pytest.mark.parametrize("op", FILES)
def test_in_the_interpreter(op):
    done = run(
        ["-m", "pytest", str(HERE / f"test_triton_{op}.py"), "-p", "no:cacheprovider", "-m", "not gpu"],
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
