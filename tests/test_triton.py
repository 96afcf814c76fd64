"""The engine `triton` without a GPU: its tests in Triton's interpreter, its ahead-of-time compile, and why it is not available."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import backend

HERE = Path(__file__).resolve().parent
FILES = sorted(map(str, HERE.glob("test_triton_*.py")))

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
def test_every_kernel_in_the_interpreter():
    done = run(["-m", "pytest", *FILES, "-p", "no:cacheprovider", "-m", "not gpu"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_a_gpu_the_engine_says_why(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        wanted = "triton does not import"
    elif torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    else:
        wanted = "torch sees no CUDA device"
    with pytest.raises(backend.EngineUnavailableError, match=wanted):
        ops.set_backend("triton")
    engine, refused = backend.engine_of("softmax", "cuda")
    assert engine == "reference"
    assert wanted in refused["triton"]
    assert backend.engine_of("softmax", "cpu")[0] != "triton"


def test_every_op_on_it_has_its_gradient_on_it():
    tables = backend._implementations
    here = {name for name, table in tables.items() if "triton" in table}
    assert {
        "adamw",
        "add_layer_norm",
        "add_rms_norm",
        "attention",
        "bias_activation",
        "cross_entropy",
        "dropout",
        "embedding",
        "geglu",
        "gelu",
        "grad_norm",
        "layer_norm",
        "linear_cross_entropy",
        "log_softmax",
        "relu",
        "rms_norm",
        "rope",
        "sigmoid",
        "silu",
        "softmax",
        "swiglu",
        "tanh",
    } <= here
    for name in here:
        backward = f"{name.removesuffix('_backward')}_backward"
        assert backward not in tables or backward in here, f"{backward} has no kernel"


def test_importing_the_ops_does_not_import_triton():
    done = run(
        ["-c", "import sys, torch; before = set(sys.modules); import fastgpt.ops; print(set(sys.modules) - before)"]
    )
    assert done.returncode == 0, done.stderr
    assert "'triton'" not in done.stdout
    assert "fastgpt.kernels" not in done.stdout


AOT_OF_ONE_KERNEL = """
import sys
from fastgpt.kernels import aot, attention, attention_tiles
attention.TILES[64] = {tile}
q = aot.meta(1, 1, 1024, 64)
aot.CALLS = {{"attention": lambda: iter([("one tile", lambda: attention.attention(q, q, q, attention_tiles.Options(False, 0.125)))])}}
sys.exit(aot.main({arguments}))
"""


@needs_triton
class TestAheadOfTime:
    def test_one_kernel_for_every_architecture(self):
        done = run(["-c", AOT_OF_ONE_KERNEL.format(tile=(64, 64, 4), arguments=["--jobs", "1"])])
        assert done.returncode == 0, done.stdout + done.stderr
        for arch in (80, 90, 100):
            assert f"sm_{arch}" in done.stdout
        assert done.stdout.rstrip().endswith("3 kernels compiled, 0 spill or do not fit")

    def test_a_spill_fails(self):
        done = run(["-c", AOT_OF_ONE_KERNEL.format(tile=(64, 64, 1), arguments=["--arch", "90", "--jobs", "1"])])
        assert done.returncode == 1, done.stdout + done.stderr
        assert "SPILLS" in done.stdout

    def test_the_interpreter_and_unknown_ops_are_refused(self):
        done = run(["-m", "fastgpt.kernels.aot"], TRITON_INTERPRET="1")
        assert done.returncode == 2
        assert "TRITON_INTERPRET is set" in done.stderr
        done = run(["-m", "fastgpt.kernels.aot", "sofmax"])
        assert done.returncode == 2
        assert "op is 'sofmax', expected one of activation, adamw, attention" in done.stderr


TUNED = """
import sys
import torch
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from fastgpt.kernels import activation, aot

runs = []

def benchmark(call, quantiles):
    call()
    runs.append(None)
    return [1.0 / len(runs)] * 3

Autotuner.do_bench = property(lambda self: benchmark)
driver.set_active(aot.CompileOnlyDriver(90))
x = torch.empty(4096, 768, dtype=torch.bfloat16, device="meta")
compiled = aot.compile_call(lambda: activation.activation("gelu", x))
print(len(runs), compiled[-1][1].metadata.num_warps)
"""


@needs_triton
def test_measured_tiles_are_kept_on_disk(tmp_path):
    """A second process measures nothing and starts the tile that was fastest: the last one, by the stub's clock."""
    variables = {"FASTGPT_AUTOTUNE": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    first, second = (run(["-c", TUNED], **variables) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.split() == ["8", "8"]
    assert second.stdout.split() == ["0", "8"]
