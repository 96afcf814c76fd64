"""The GPU benchmark on a machine without one: its plan, the rounds, the deadline, and the whole way to a result file, on the CPU."""

import functools
import json
import os

import pytest
import torch

from fastgpt import ops
from fastgpt.benchmarks.gpu import __main__ as command
from fastgpt.benchmarks.gpu import cases as all_cases
from fastgpt.benchmarks.gpu.kit import HOPPER, Case, Kit, Made, both
from fastgpt.benchmarks.gpu.step import train_step
from fastgpt.benchmarks.gpu.timing import MIN_ROUNDS, WallTimer, measure
from fastgpt.benchmarks.variants import Variant
from fastgpt.ops import backend


class Clock:
    """A clock that only its owner moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def case(name, variants, expected=1.0):
    """A case of an op "sum" whose variants return numbers."""

    def make(kit):
        made = [Variant(v, lambda x=x: torch.tensor([x]), ours=v.startswith("fastgpt")) for v, x in variants.items()]
        return Made(made, lambda: (torch.tensor([expected], dtype=torch.float64),))

    return Case("sum", name, "fp32", (1,), make, bytes_moved=2_000_000, flops=10, tokens=5)


def run_of(tmp_path, clock=None, **options):
    clock = clock or Clock()

    def timer(run):
        run()
        clock.now += 0.25
        return 0.002

    return command.Run(tmp_path, Kit("cpu", ["cpu"], False, 1), timer, clock, **options)


def written(tmp_path, op="sum"):
    return json.loads(next(tmp_path.glob(f"*/gpu_{op}.json")).read_text())


def test_rounds_go_through_all_variants_in_turns():
    calls, clock = [], Clock()
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]

    def timer(run):
        run()
        clock.now += 0.01
        return float(len(calls))

    times = measure(variants, timer, clock, rounds=(4, 4))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert times[0].seconds == (4.0, 9.0, 11.0, 13.0)
    assert times[0].median == 10.0
    assert len(measure(variants, timer, lambda: 1e9 * len(calls))[0].seconds) == MIN_ROUNDS


def test_every_case_of_the_small_plan_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    cases = [*all_cases.plan(small=True), train_step(2, small=True)]
    run = command.Run(tmp_path, Kit("cpu", ["cpu"], True, 1), WallTimer())
    run.measure_ceilings(1 << 12, 16)
    run.end = run.clock() + 600  # more than it takes
    quick = command.measure
    command.measure = lambda *args, **_: quick(*args, rounds=(2, 2))
    try:
        run.cases(cases)
    finally:
        command.measure = quick
    found = {file.stem.removeprefix("gpu_"): json.loads(file.read_text()) for file in tmp_path.glob("*/*.json")}
    assert set(found) == {c.op for c in cases}
    assert sum(len(result["cases"]) for result in found.values()) == len(cases)
    for op, result in found.items():
        assert result["failed"] == {}, op
        assert result["ceilings"]["copy_gb_per_s"] > 0
        for row in result["cases"]:
            names = {v["name"] for v in row["variants"]}
            assert "fastgpt cpu" in names or "fastgpt" in names, (op, row["left_out"])
            assert any(not v["ours"] for v in row["variants"]), (op, row["left_out"])
            assert row["left_out"] == {}, op
            assert all(v["median_ms"] > 0 and v["errors"] for v in row["variants"])


def test_figures_and_shares(tmp_path):
    run = run_of(tmp_path)
    run.ceilings = {"copy_gb_per_s": 4.0, "product_tflop_per_s": 1e-8}
    run.cases([case("a", {"fastgpt cpu": 1.0, "torch eager": 1.0})])
    row = written(tmp_path)["cases"][0]["variants"][0]
    assert row["median_ms"] == 2.0
    assert row["gb_per_s"] == pytest.approx(1.0)
    assert row["share_of_copy"] == pytest.approx(0.25)
    assert row["gflop_per_s"] == pytest.approx(5e-6)
    assert row["share_of_product"] == pytest.approx(0.5)
    assert row["tokens_per_s"] == pytest.approx(2500)


def test_a_wrong_variant_is_left_out_with_its_error(tmp_path):
    run_of(tmp_path).cases([case("a", {"fastgpt cpu": 1.1, "torch eager": 1.0, "other": 2.0, "third": 1.001})])
    result = written(tmp_path)["cases"][0]
    assert [v["name"] for v in result["variants"]] == ["torch eager", "third"]
    assert "relative errors against float64: 0.1 (limit" in result["left_out"]["fastgpt cpu"]
    assert "other" in result["left_out"]


def test_a_variant_that_fails_only_when_timed_is_left_out(tmp_path):
    def run():
        raise RuntimeError("no room to compile")

    def make(kit):
        made = case("a", {"torch eager": 1.0}).make(kit)
        made.variants.append(Variant("compiled", run, first=lambda: torch.tensor([1.0])))
        return made

    run_of(tmp_path).cases([Case("sum", "a", "fp32", (1,), make)])
    result = written(tmp_path)
    assert [v["name"] for v in result["cases"][0]["variants"]] == ["torch eager"]
    assert result["cases"][0]["left_out"] == {"compiled": "RuntimeError: no room to compile"}


def test_a_case_that_raises_ends_only_itself(tmp_path):
    def make(kit):
        raise RuntimeError("no room")

    broken = Case("sum", "b", "fp32", (1,), make)
    run_of(tmp_path).cases([case("a", {"torch eager": 1.0}), broken, case("c", {"torch eager": 1.0})])
    result = written(tmp_path)
    assert [row["case"] for row in result["cases"]] == ["a", "c"]
    assert result["failed"] == {"b fp32 1": "RuntimeError: no room"}


def test_what_is_done_before_the_deadline_is_kept(tmp_path):
    cases = [case(name, {"torch eager": 1.0}) for name in "abc"]
    run_of(tmp_path, limit_s=2.0).cases(cases)
    result = written(tmp_path)
    assert [row["case"] for row in result["cases"]] == ["a"]
    assert result["failed"] == {"b fp32 1": "the time was over", "c fp32 1": "the time was over"}


def test_torch_compile_needs_time(tmp_path):
    seen = []

    def make(kit):
        seen.append(kit.compiles)
        return case("a", {"torch eager": 1.0}).make(kit)

    run = run_of(tmp_path, limit_s=command.COMPILE_S + 1)
    run.kit.compiles = True
    run.cases([Case("sum", name, "fp32", (1,), make) for name in "ab"])
    assert seen == [True, False]
    assert run.kit.compiles


def test_every_case_is_compiled(tmp_path, monkeypatch):
    """Without a reset torch.compile stops after eight of torch's functions, whose code is one to it, and runs eager."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def make(kit):
        bind = both((torch.ones(2),), torch.ones(2))
        return Made(kit.torchs(torch.relu, bind), lambda: (torch.ones(2, dtype=torch.float64),), tuple)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run = run_of(tmp_path, limit_s=1e6)
    run.kit.compiles = True
    run.cases([Case("relu", str(i), "fp32", (2,), make) for i in range(10)])
    assert len(compiled) == len(written(tmp_path, "relu")["cases"]) == 10


def test_the_dry_run_names_every_case(capsys):
    assert command.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    for one in all_cases.plan():
        assert f"{one.op:20} {command.name_of(one)}" in shown
    assert "train_step" in shown
    assert "torch SDPA cuDNN" in shown
    assert "fastgpt cuda, sm_80, fastgpt cuda, sm_90" in shown


def test_both_sets_of_attention_kernels_on_hopper(monkeypatch):
    kit = Kit("cpu", ["cuda"], False, 1)
    monkeypatch.setattr(kit, "_is_hopper", lambda: True)
    monkeypatch.setattr(backend, "unavailable", lambda engine: None)
    monkeypatch.setenv(HOPPER, "0")
    variants = kit.ours(lambda: (os.environ[HOPPER], ops.get_backend()), chips=True)
    assert {v.name: v.run() for v in variants} == {
        "fastgpt cuda, sm_80": ("0", "cuda"),
        "fastgpt cuda, sm_90": ("1", "cuda"),
    }
    assert os.environ[HOPPER] == "0"
    monkeypatch.delenv(HOPPER)
    variants[1].run()
    assert HOPPER not in os.environ
    assert [v.name for v in kit.ours(lambda: None)] == ["fastgpt cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device; --dry-run prints the plan" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
