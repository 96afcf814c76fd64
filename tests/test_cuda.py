"""The engine `cuda` without a GPU: when it is built, why it is not available, when its kernels are chosen, what ptxas says of them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from fastgpt import ops
from fastgpt.ops import backend, cuda

SETUP, CHECK = ROOT / "setup.py", ROOT / "csrc" / "cuda" / "check.py"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("FASTGPT_", "CUDA_"))}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-P", *command],
        env=variables | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def load_check():
    spec = importlib.util.spec_from_file_location("fastgpt_cuda_check", CHECK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load_check()
needs_nvcc = pytest.mark.skipif(check.find_nvcc() is None, reason="needs nvcc")
needs_build = pytest.mark.skipif(
    importlib.util.find_spec("fastgpt._cuda") is None, reason="built without the CUDA kernels"
)
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def test_the_switch_of_the_build(tmp_path):
    nowhere = {"PATH": str(tmp_path)}
    asked = run(str(SETUP), "--name", FASTGPT_CUDA="1", **nowhere)
    assert asked.returncode != 0
    assert "FASTGPT_CUDA=1 asks for the CUDA kernels, but there is no nvcc on the PATH" in asked.stderr
    wrong = run(str(SETUP), "--name", FASTGPT_CUDA="yes", **nowhere)
    assert wrong.returncode != 0
    assert "FASTGPT_CUDA is 'yes', expected 0, 1 or auto" in wrong.stderr
    auto = run(str(SETUP), "--name", **nowhere)
    assert auto.returncode == 0, auto.stderr
    assert "NVRTC will compile the CUDA kernels at their first use: no nvcc on the PATH" in auto.stderr
    never = run(str(SETUP), "--name", FASTGPT_CUDA="0")
    assert "built without the CUDA kernels: FASTGPT_CUDA=0" in never.stderr


def test_an_nvcc_that_does_not_work_is_left_alone_unless_it_is_required(tmp_path):
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvcc"
    broken.write_text("#!/bin/sh\necho no host compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    auto = run(str(SETUP), "--name", CUDA_HOME=str(tmp_path))
    assert auto.returncode == 0, auto.stderr
    assert "does not work: no host compiler" in auto.stderr
    assert run(str(SETUP), "--name", CUDA_HOME=str(tmp_path), FASTGPT_CUDA="1").returncode != 0


@no_device
def test_it_says_why_it_is_not_available_and_raises_so_when_forced():
    reason = backend.unavailable("cuda")
    assert reason
    with pytest.raises(backend.EngineUnavailableError, match="backend 'cuda' is forced but not available"):
        ops.set_backend("cuda")
    forced = run("-c", "from fastgpt import ops", FASTGPT_BACKEND="cuda")
    assert forced.returncode != 0
    assert "'cuda' is forced but not available" in forced.stderr


@needs_build
@no_device
def test_the_module_loads_without_a_driver():
    done = run("-c", "from fastgpt import _cuda; print(_cuda.why_no_device())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != "None"


def test_a_kernel_that_never_ran_on_a_gpu_is_not_chosen_unless_asked_for(monkeypatch):
    real = backend.unavailable
    monkeypatch.setattr(backend, "unavailable", lambda engine: None if engine == "cuda" else real(engine))
    monkeypatch.delenv("FASTGPT_CUDA_UNVERIFIED", raising=False)
    monkeypatch.setattr(cuda, "VERIFIED", frozenset())
    engine, refused = backend.engine_of("softmax", "cuda")
    assert engine != "cuda"
    assert "never run on a GPU" in refused["cuda"]
    monkeypatch.setenv("FASTGPT_CUDA_UNVERIFIED", "1")
    assert backend.engine_of("softmax", "cuda")[0] == "cuda"
    monkeypatch.delenv("FASTGPT_CUDA_UNVERIFIED")
    monkeypatch.setattr(cuda, "VERIFIED", frozenset({"softmax"}))
    assert backend.engine_of("softmax", "cuda")[0] == "cuda"
    assert backend.engine_of("gelu", "cuda")[0] != "cuda"
    assert cuda.held_back("softmax_backward") is None


def test_other_tensors_are_not_covered():
    x = torch.randn(3)
    for call in (
        lambda: cuda._softmax(x, None, 1.0, False),
        lambda: backend._implementations["gelu"]["cuda"](x, "none"),
        lambda: cuda._dropout(x, None, torch.tensor(1), 0.5),
    ):
        with pytest.raises(backend.NotCovered, match="tensors on cpu"):
            call()


@needs_nvcc
def test_no_kernel_of_a_file_spills_or_is_warned_of():
    done = run(
        str(CHECK), "--arch", "90a", "--", str(CHECK.parent / "dropout.cu"), CUDA_HOME=os.environ.get("CUDA_HOME", "")
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "dropout_kernel" in line]
    assert len(lines) == 10, done.stdout  # three types and two of them with an fp32 residual, aligned and not


@needs_nvcc
def test_a_spill_fails_the_check(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) f(const float* x, float* y) { float v[200];\n"
        "#pragma unroll\n for (int i = 0; i < 200; ++i) v[i] = x[i * 1024 + threadIdx.x];\n __syncthreads();\n"
        "#pragma unroll\n for (int i = 0; i < 200; ++i) y[i * 1024 + threadIdx.x] = v[199 - i] * v[i]; }\n"
    )
    done = run(str(CHECK), "--arch", "80", "--", str(source))
    assert done.returncode == 1
    assert "spill" in done.stderr


def test_remarks_on_wgmma_fail_the_check():
    text = "ptxas info    : (C7517) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert check.parse(text)[1] == [text]
