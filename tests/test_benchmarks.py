"""The benchmarks' harness: what it measures is what ran, variants that disagree are not timed, results are complete and read back.

Every benchmark itself runs once, in quick mode and in a fresh process, in `test_every_benchmark_runs`.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt
from fastgpt import benchmarks
from fastgpt.errors import UserError

pytest.importorskip("pytest_benchmark")

from pytest_benchmark.stats import Metadata

from fastgpt.benchmarks import harness, plain_gpt, plot, record, table
from fastgpt.benchmarks.variants import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    QUICK_ROUNDS,
    ROUND_S,
    DisagreementError,
    Variant,
    check,
    error_of,
    measure,
    ours,
    time_round,
)
from fastgpt.model import GPT, GPTConfig


class Clock:
    """A clock that only moves when told to, so that timings are exact."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, log: list[str] | None = None, name: str = "") -> Any:
        def run() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


def statistics(variant: Variant, iterations: int) -> Metadata:
    return Metadata(harness._Entry(variant.name, variant.name, "group"), iterations, {})


def test_times_are_a_calls_own_and_rounds_are_long_enough() -> None:
    clock = Clock()
    variants = [Variant("fast", clock.work(0.0005)), Variant("slow", clock.work(0.05))]
    fast, slow = measure(variants, statistics, timer=clock)
    assert fast.stats.median == pytest.approx(0.0005)
    assert slow.stats.median == pytest.approx(0.05)
    assert fast.iterations * 0.0005 >= ROUND_S
    assert slow.iterations == 1
    assert fast.stats.rounds == slow.stats.rounds
    assert MIN_ROUNDS <= fast.stats.rounds <= MAX_ROUNDS


def test_rounds_take_turns_and_begin_with_another_variant_each() -> None:
    clock, log = Clock(), list[str]()
    variants = [Variant(name, clock.work(1.0, log, name)) for name in "abc"]
    records = measure(variants, statistics, rounds=3, timer=clock)
    assert "".join(log) == "abc" + "bca" + "cab"
    assert [r.stats.rounds for r in records] == [3, 3, 3]


def test_what_comes_before_a_round_is_not_timed() -> None:
    clock = Clock()
    slow_start = clock.work(5.0)
    (timed,) = measure([Variant("v", clock.work(0.1), before=slow_start)], statistics, rounds=4, timer=clock)
    assert timed.stats.max == pytest.approx(0.1)


def test_garbage_collection_is_off_in_a_round_and_on_after_it() -> None:
    import gc

    seen = list[bool]()
    time_round(Variant("v", lambda: seen.append(gc.isenabled())), 2)
    assert seen == [False, False]
    assert gc.isenabled()


def test_errors_are_relative_to_the_largest_value() -> None:
    right = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert error_of(torch.tensor([1.0, -4.0]), right) == 0.0
    assert error_of(torch.tensor([1.0, -3.0]), right) == pytest.approx(0.25)
    assert error_of(torch.tensor([1.0, math.nan]), right) == math.inf
    assert error_of(torch.tensor([1.0]), right) == math.inf


@pytest.mark.parametrize(
    ("our_error", "torch_error", "accepted"),
    [
        (1e-6, 1e-6, True),
        (2e-6, 1e-6, True),
        (4e-6, 1e-6, False),
        (1e-3, 5e-3, False),
        (math.inf, 1e-6, False),
        (0.0, 0.05, False),
    ],
)
def test_ours_may_be_off_by_twice_the_baselines_error(our_error: float, torch_error: float, accepted: bool) -> None:
    variants = [ours(lambda: None), Variant("torch eager", lambda: None)]
    errors = [[our_error], [torch_error]]
    if accepted:
        check(variants, errors, "fp32")
        return
    with pytest.raises(DisagreementError, match="torch eager" if torch_error == 0.05 else "fastgpt"):
        check(variants, errors, "fp32")


def bench_file(folder: Path, text: str) -> Path:
    """A benchmark of its own on the real harness; pytest keeps modules by name, so each has its own."""
    file = folder / f"bench_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    file.write_text(f"import torch\nfrom fastgpt.benchmarks.harness import Variant, ours\n{text}")
    return file


def run_file(file: Path, out: Path) -> tuple[int, Any]:
    """A benchmark file through pytest and the real plugin, in quick mode."""
    plugin = harness.Plugin(harness.Settings(quick=True, out=out, command="made up"))
    options = [
        "--config-file",
        os.devnull,
        "--rootdir",
        str(file.parent),
        "--import-mode=importlib",
        "--benchmark-quiet",
    ]
    options += ["-q", "-p", "no:cacheprovider", "--override-ini=python_functions=bench_*"]
    return int(pytest.main([*options, str(file)], plugins=[plugin])), plugin


GOOD = """
def bench_double(compare):
    x = torch.arange(1.0, 9.0)
    compare("forward", shape=(8,), dtype="fp32", bytes_moved=64, flops=8, expected=lambda: (2 * x.double(),),
            variants=[ours(lambda: x + x), Variant("torch eager", lambda: 2 * x)])
"""
WRONG = """
def bench_wrong(compare):
    x = torch.arange(1.0, 9.0)
    compare("backward", shape=(8,), dtype="fp32", expected=lambda: (2 * x.double(),),
            variants=[ours(lambda: 2.001 * x), Variant("torch eager", lambda: 2 * x)])
"""
OPTIONAL = """
def bench_optional(compare):
    def broken():
        raise OSError("no compiler")
    x = torch.ones(3)
    compare("forward", shape=(3,), dtype="fp32", expected=lambda: (x.double(),),
            variants=[ours(lambda: x), Variant("torch.compile", broken, optional=True)])
"""


def test_a_result_file_holds_numbers_and_what_they_were_taken_on(tmp_path: Path) -> None:
    code, plugin = run_file(bench_file(tmp_path, GOOD), tmp_path / "out")
    assert code == 0
    file, picture = plugin.written
    result = record.read(file)
    assert file.parent.name == record.slug(result["machine"]["chip"])
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["fastgpt"] == fastgpt.__version__
    assert result["command"] == "made up"
    assert result["failed"] == {}
    (case,) = result["cases"]
    assert [row["name"] for row in case["variants"]] == ["fastgpt", "torch eager"]
    for row in case["variants"]:
        assert row["rounds"] == QUICK_ROUNDS
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["gb_per_s"] == pytest.approx(64 / row["median_ms"] / 1e6)
        assert row["gflop_per_s"] == pytest.approx(8 / row["median_ms"] / 1e6)
        assert row["errors"] == [0.0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_variants_that_disagree_fail_the_run_and_give_no_numbers(tmp_path: Path) -> None:
    code, plugin = run_file(bench_file(tmp_path, GOOD + WRONG), tmp_path / "out")
    assert code == 1
    result = record.read(plugin.written[0])
    assert [case["case"] for case in result["cases"]] == ["forward"]
    assert list(result["failed"]) == ["bench_wrong"]
    assert "fastgpt: relative errors against float64" in result["failed"]["bench_wrong"]


def test_an_optional_variant_that_cannot_run_is_left_out_with_its_reason(tmp_path: Path) -> None:
    code, plugin = run_file(bench_file(tmp_path, OPTIONAL), tmp_path / "out")
    assert code == 0
    (case,) = record.read(plugin.written[0])["cases"]
    assert case["left_out"] == {"torch.compile": "no compiler"}
    assert [row["name"] for row in case["variants"]] == ["fastgpt"]


def test_every_benchmark_runs(tmp_path: Path) -> None:
    """As `fastgpt bench --quick` does it, in a folder that is no checkout; every op that has an engine of ours has a benchmark."""
    code = "import sys; from fastgpt.benchmarks import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, "--quick", "--threads", "1", "--out", "results"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "results").glob("*/*.json")}
    assert set(files) == set(benchmarks.names())
    for name, found in files.items():
        assert found["cases"], name
        assert found["failed"] == {}
        assert found["machine"]["threads"] == 1
        for case in found["cases"]:
            assert any(row["ours"] for row in case["variants"])
            assert not all(row["ours"] for row in case["variants"])
    losses = [row["first_losses"] for case in files["train_step"]["cases"] for row in case["variants"]]
    assert all(
        len(values) == 3 and values[-1] < values[0] for values in losses
    )  # the same batch three times: it is learnt


def test_quick_writes_nothing_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmarks, "_run", lambda *arguments: asked.append(arguments) or 0)
    benchmarks.main(["softmax", "--quick"])
    benchmarks.main(["softmax", "--quick", "--out", "here"])
    benchmarks.main(["softmax"])
    assert [arguments[1] for arguments in asked] == [None, Path("here"), Path("fastgpt-bench")]
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "fastgpt").mkdir()
    for file in ("benchmarks/harness.py", "fastgpt/__init__.py"):
        (tmp_path / file).touch()
    benchmarks.main([])
    assert asked[-1][:2] == (list(benchmarks.names()), Path("benchmarks/results"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sofmax"], "did you mean 'softmax'"),
        (["--thread", "2"], "--thread"),
        (["--threads", "0"], "--threads is 0"),
        (["--threads", "two"], "--threads"),
        (["--plot", "--out", "absent"], "no results"),
    ],
)
def test_wrong_arguments_are_user_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        benchmarks.main(arguments)


def test_without_pytest_benchmark_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else 1)
    with pytest.raises(UserError, match=r"need pytest-benchmark: pip install 'fastgpt-kernels\[bench\]'"):
        benchmarks.main(["softmax"])


def test_the_list_names_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["--list"]) == 0
    named = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    on_the_harness = {
        file.stem for file in benchmarks.FOLDER.glob("bench_*.py") if "compare: Compare" in file.read_text()
    }
    assert named == {stem.removeprefix("bench_") for stem in on_the_harness}
    assert {"softmax", "attention", "train_step"} <= named


def test_drawing_a_file_that_is_no_result_names_it(tmp_path: Path) -> None:
    file = tmp_path / "chip" / "softmax.json"
    file.parent.mkdir()
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"softmax\.json: is not a benchmark's result"):
        plot.draw(file)
    with pytest.raises(UserError, match=r"softmax\.json"):
        benchmarks.main(["--plot", "--out", str(tmp_path)])


def test_the_plain_model_is_ours_with_the_same_weights() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=31, block_size=12, n_layer=2, n_head=2, n_embd=16, activation="gelu", init="xavier")
    model, plain = GPT(config), plain_gpt.PlainGPT(config)
    plain.load_state_dict(model.state_dict())
    idx, targets = torch.randint(31, (2, 3, 12))
    (logits, loss), (plain_logits, plain_loss) = model(idx, targets), plain(idx, targets)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        plain_gpt.PlainGPT(GPTConfig(vocab_size=31, block_size=12, n_layer=2, n_head=2, n_embd=16))


def result_file(folder: Path, name: str, case: str, **medians: float) -> None:
    variants = [
        {"name": key.replace("_", " "), "ours": key.startswith("fastgpt"), "median_ms": ms}
        for key, ms in medians.items()
    ]
    (folder / f"{name}.json").write_text(
        json.dumps({"benchmark": name, "machine": {}, "cases": [{"name": case, "variants": variants}]})
    )


def test_readmes_tables_compare_with_the_fastest_other(tmp_path: Path) -> None:
    result_file(
        tmp_path,
        "cross_entropy",
        "forward and backward fp32 4096x50257",
        fastgpt=4.0,
        fastgpt_in_place=1.0,
        torch_eager=40.0,
        compiled=12.0,
    )
    result_file(
        tmp_path, "train_step", "12 layers, 768 wide, T 256, B 4: step bf16", fastgpt=5.0, torch_eager=9.0, compiled=6.0
    )
    lines = table.tables(tmp_path).splitlines()
    assert lines[2:4] == [
        "| cross_entropy 4096 x 50257, forward + backward | 3.0 x |  |",
        "| the same, the gradient in place of the logits | 12 x |  |",
    ]
    assert lines[-1] == "| GPT-2 124M, T 256, B 4 |  |  | 1.2 x | 5 against 6 ms, 1.2 x |"


def test_readmes_tables_are_those_of_the_result_files() -> None:
    root = Path(__file__).parents[1]
    (chip,) = (root / "benchmarks/results").glob("amd-*")
    assert table.tables(chip) in (root / "README.md").read_text()
