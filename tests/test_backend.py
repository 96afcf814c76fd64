"""The frame every op stands on: choice of engine, forcing one, what is logged and what raises."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from parity import random

from fastgpt import ops
from fastgpt.ops import backend


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter with some environment variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_op_has_an_engine_and_a_formula():
    names = backend.op_names()
    assert {"attention", "cross_entropy", "gelu", "layer_norm", "relu", "sigmoid", "silu", "softmax", "tanh"} <= set(
        names
    )
    for name in names:
        engine, refused = backend.engine_of(name, "cpu")
        assert engine == "cpu", refused
        assert backend.engine_of(name, "meta")[0] == "reference"


def test_the_engine_that_runs_is_the_one_named(monkeypatch):
    called = []

    def spy(*args):
        called.append("cpu")
        return kept(*args)

    kept = backend._implementations["tanh"]["cpu"]
    monkeypatch.setitem(backend._implementations["tanh"], "cpu", spy)
    ops.tanh(random(4))
    assert called == ["cpu"]
    with ops.use_backend("reference"):
        ops.tanh(random(4))
    assert called == ["cpu"]
    with ops.use_backend("cpu"):
        ops.tanh(random(4))
    assert called == ["cpu", "cpu"]
    assert ops.get_backend() == "auto"


def test_what_an_engine_does_not_cover_goes_to_the_formula_and_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        for _ in range(3):
            ops.tanh(random(4, dtype=torch.float64))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "tanh: engine cpu does not cover this input (dtype torch.float64" in messages[0]


def test_a_forced_engine_that_does_not_cover_the_input_raises():
    with (
        ops.use_backend("cpu"),
        pytest.raises(NotImplementedError, match=r"'cpu' is forced but does not cover this: dtype torch\.float64"),
    ):
        ops.softmax(random(4, dtype=torch.float64))


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        ops.set_backend("referense")
    assert ops.get_backend() == "auto"


def test_the_environment_forces_a_backend():
    code = "from fastgpt import ops; print(ops.get_backend(), ops.backend.engine_of('gelu')[0])"
    assert run_python(code, FASTGPT_BACKEND="reference").stdout.split() == ["reference", "reference"]
    wrong = run_python(code, FASTGPT_BACKEND="gpu")
    assert wrong.returncode != 0
    assert "backend: got 'gpu', expected one of auto" in wrong.stderr


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512f", "avx512bf16", "avx512amx"])
def test_the_environment_chooses_the_instruction_set(isa):
    from fastgpt import _cpu

    code = "import torch; from fastgpt import _cpu; print(_cpu.isa())"
    result = run_python(code, FASTGPT_CPU_ISA=isa)
    if any(name.startswith(isa) for name in _cpu.available_isas()):
        assert result.stdout.strip().startswith(isa)
    else:
        assert f"no {isa}" in result.stderr


def test_an_unknown_instruction_set_falls_back_with_a_reason_and_raises_when_forced():
    code = "from fastgpt import ops; print(ops.backend.engine_of('gelu'))"
    result = run_python(code, FASTGPT_CPU_ISA="sse9")
    assert "'reference'" in result.stdout
    assert "expected portable, avx2 or avx512" in result.stdout
    forced = run_python(code, FASTGPT_CPU_ISA="sse9", FASTGPT_BACKEND="cpu")
    assert forced.returncode != 0
    assert "'cpu' is forced but not available" in forced.stderr


def test_importing_the_package_is_lazy_and_patches_nothing():
    code = (
        "import sys, fastgpt; assert 'torch' not in sys.modules; from fastgpt import Tokenizer; assert 'torch' not in sys.modules;"
        "import torch; before = {k: v for k, v in vars(torch.nn.functional).items()};"
        "from fastgpt import ops; assert all(vars(torch.nn.functional)[k] is v for k, v in before.items()); print('ok')"
    )
    result = run_python(code)
    assert result.stdout.strip() == "ok", result.stderr


def test_one_openmp_in_the_process():
    code = "from fastgpt import ops; ops.gelu(__import__('torch').randn(9)); print(open('/proc/self/maps').read())"
    maps = run_python(code).stdout
    libraries = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    assert len(libraries) == 1, libraries


def test_the_number_of_threads_is_torchs():
    from fastgpt.ops import cpu

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert cpu.threads() == 1
    finally:
        torch.set_num_threads(before)


def test_second_derivatives_raise_instead_of_being_wrong():
    x = random(4).requires_grad_()
    (grad,) = torch.autograd.grad(ops.tanh(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_no_engine_for_an_op_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_implementations", {"tanh": {}})
    with pytest.raises(backend.EngineUnavailableError, match="no engine runs on cpu"):
        backend.engine_of("tanh")
    with pytest.raises(NotImplementedError, match="no engine covers"):
        ops.tanh(random(3))


def test_modes_and_subclasses_see_the_op_inside_its_autograd_rule():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = random(4).requires_grad_()
    with Spy():
        ops.tanh(x)
    assert torch.ops.fastgpt.tanh.default in seen
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert type(ops.tanh(fake)).__name__ == "FakeTensor"
    assert ops.tanh(torch.empty(3, device="meta", requires_grad=True)).is_meta
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.tanh(x)
    assert "fastgpt::tanh" in {event.key for event in profile.key_averages()}
    negative = torch.view_as_complex(random(4, 2)).conj().imag
    assert negative.is_neg()
    assert torch.equal(ops.relu(negative), torch.relu(negative))


def test_plain_tensors_go_past_the_dispatcher(monkeypatch):
    calls = []
    run = backend._run
    monkeypatch.setattr(backend, "_run", lambda op, *args: calls.append(op) or run(op, *args))
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda self, *args: pytest.fail("through the dispatcher"))
    x = random(4).requires_grad_()
    ops.tanh(x).sum().backward()
    assert calls == ["tanh", "tanh_backward"]
    with torch.no_grad():
        ops.tanh(x)
    assert calls == ["tanh", "tanh_backward", "tanh"]
