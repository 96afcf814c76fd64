"""The GPU benchmark's command as a whole, on a CPU: started from a checkout, and what it makes of workers that end badly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.gpu import __main__ as command
from fastgpt.benchmarks.gpu.kit import both, library
from fastgpt.benchmarks.gpu.supervise import DeviceLostError, State, supervise
from fastgpt.benchmarks.variants import Variant

ROOT = Path(__file__).resolve().parent.parent

# A worker with three cases of two variants each; {trouble} stands in the second case's first variant, {cases} before all.
WORKER = """
import argparse, os, signal, sys, time
from pathlib import Path
import torch
from fastgpt.benchmarks.gpu import __main__ as command
from fastgpt.benchmarks.gpu.kit import Case, Made
from fastgpt.benchmarks.variants import Variant

def case(name):
    def bad():
        if name == "b":
            {trouble}
        return torch.ones(1)
    def make(kit):
        {make}
        right = Variant("right", lambda: torch.ones(1))
        return Made([Variant("bad", bad), right], lambda: (torch.ones(1, dtype=torch.float64),))
    return Case("sum", name, "fp32", (1,), make, flops=1)

parser = argparse.ArgumentParser()
parser.add_argument("--state", type=Path)
parser.add_argument("--seconds", type=float)
given = parser.parse_args()
given.small, given.out = True, Path({out!r})
sys.exit(command.work(given, [case(name) for name in "abc"], "test"))
"""


def supervised(tmp_path, trouble="pass", make="pass", seconds=120.0, stall_s=60.0):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(trouble=trouble, make=make, out=str(tmp_path / "out")))
    code = supervise([sys.executable, "-P", str(script)], tmp_path / "state.json", seconds, stall_s)
    found = list((tmp_path / "out").glob("*/gpu_sum.json"))
    return code, json.loads(found[0].read_text()) if found else None


def names(result):
    return {row["case"]: [v["name"] for v in row["variants"]] for row in result["cases"]}


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
        ("raise command.DeviceLostError('an illegal address')", "the device is lost: an illegal address"),
    ],
)
def test_a_variant_that_ends_the_process_costs_itself_alone(tmp_path, trouble, why):
    code, result = supervised(tmp_path, trouble)
    assert code == 0
    assert names(result) == {"a": ["bad", "right"], "b": ["right"], "c": ["bad", "right"]}
    assert why in result["cases"][1]["left_out"]["bad"]
    assert result["ceilings"]["copy_gb_per_s"] > 0


def test_a_variant_that_never_returns(tmp_path):
    code, result = supervised(tmp_path, "time.sleep(600)", stall_s=10.0)
    assert code == 0
    assert names(result)["b"] == ["right"]
    assert result["cases"][1]["left_out"]["bad"] == "nothing happened for 10 s"


def test_a_case_that_ends_the_process_outside_of_its_variants(tmp_path):
    code, result = supervised(tmp_path, make="name == 'b' and os._exit(7)")
    assert code == 1
    assert list(names(result)) == ["a", "c"]
    assert result["failed"] == {"b fp32 1": "the process ended with code 7"}


def test_a_worker_that_cannot_start_is_not_tried_for_ever(tmp_path, capfd):
    script = tmp_path / "worker.py"
    script.write_text("import sys; print('started'); sys.exit(9)")
    assert supervise([sys.executable, str(script)], tmp_path / "state.json", 60.0) == 3
    shown = capfd.readouterr()
    assert shown.out.count("started") == 2
    assert "the start: the process ended with code 9" in shown.err


def test_the_time_ends_a_worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(600)")  # a worker of the benchmark looks at the time itself, too
    assert supervise([sys.executable, str(script)], tmp_path / "state.json", 3.0) == 3
    assert State(tmp_path / "state.json").code is None


def test_a_device_that_does_not_answer_ends_the_case_at_its_variant(monkeypatch):
    def bad():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(command, "answers", lambda device: False)
    seen = []
    made = command.Made([Variant("bad", bad)], lambda: (torch.ones(1),))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        command.checked(made, "fp32", torch.device("cpu"), None, seen.append)
    assert seen == ["bad"]


def test_another_library_may_overwrite_its_inputs(tmp_path, monkeypatch):
    """Liger-Kernel writes gradients in the place of logits and of what the backward is given."""
    (tmp_path / "rude_library.py").write_text(
        "def double(x):\n    y = x * 2\n    x.data.zero_()\n    y.register_hook(lambda g: g.data.zero_())\n    return y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x, grad = torch.ones(3), torch.ones(3)
    (variant,) = library("rude", "rude_library", "double", both((x,), grad))
    for _ in range(2):
        variant.before()
        variant.run()
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(grad, torch.ones(3))
    (absent,) = library("rude", "rude_library", "halve", both((x,), grad))
    with pytest.raises(AttributeError, match="halve"):
        absent.run()
    assert library("absent", "no_such_library.functional", "f", both((x,), grad)) == []


@pytest.mark.skipif(not (ROOT / "benchmarks/gpu").is_dir(), reason="not in a checkout")
class TestFromACheckout:
    def run(self, *arguments, **variables):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | variables
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )  # fmt: skip

    def test_the_installed_package_is_the_one_that_is_measured(self):
        done = self.run("--dry-run")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "attention" in done.stdout

    def test_so_it_is_under_python_m_pytest(self):
        """The way to the tests on a GPU, too."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/test_stubs.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def test_the_whole_command_in_small_without_the_packages_of_bench(self, tmp_path):
        for name in ("pytest", "pytest_benchmark", "matplotlib"):
            (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')\n")
        done = self.run("--small", "--out", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "engine cpu: is there" in done.stdout
        files = {f.stem: json.loads(f.read_text()) for f in (tmp_path / "out").glob("*/*.json")}
        assert {"gpu_attention", "gpu_train_step", "gpu_softmax"} <= files.keys()
        assert files["gpu_attention"]["command"].startswith("python -m benchmarks.gpu --small --out")
        assert "--state" not in files["gpu_attention"]["command"]
