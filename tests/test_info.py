"""`fastgpt info`: what it says agrees with the machine, and nothing that is missing or wrong stops it."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import _cpu, info
from fastgpt.errors import UserError
from fastgpt.ops import backend


def run_info(*, before: str = "", **environment: str) -> dict[str, object]:
    """`fastgpt info --json` in a fresh process, after the Python lines `before`."""
    code = f"{before}\nfrom fastgpt.info import main\nraise SystemExit(main(['--json']))"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FASTGPT_")}
    paths = os.pathsep.join([str(Path(fastgpt.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**clean, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_it_says_what_torch_and_the_engine_say() -> None:
    found = info.collect()
    assert found["versions"]["fastgpt"] == fastgpt.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["isa"] == {"available": _cpu.available_isas(), "used": _cpu.isa(), "error": None}
    assert (found["cuda"]["device"] is None) != torch.cuda.is_available()
    assert (found["cuda"]["device"] is None) == bool(found["cuda"]["reason"])
    assert json.loads(json.dumps(found)) == found


def test_the_table_is_the_choice_that_the_ops_make() -> None:
    table = info.engines(("cpu", "cuda"))["ops"]
    assert list(table["cpu"]) == backend.op_names()
    for device in ("cpu", "cuda"):
        for op, row in table[device].items():
            assert (row["engine"], row["not_used"]) == backend.engine_of(op, device)


def test_a_forced_engine_is_shown() -> None:
    with backend.use_backend("reference"):
        found = info.collect()
    assert found["engines"]["forced"] == "reference"
    assert {row["engine"] for row in found["engines"]["ops"]["cpu"].values()} == {"reference"}
    assert "reference (forced)" in info.render(found)


def test_a_wrong_backend_is_reported_and_the_table_is_without_it() -> None:
    found = run_info(FASTGPT_BACKEND="cpuu")["engines"]
    assert isinstance(found, dict)
    assert "cpuu" in found["error"]
    assert "did you mean 'cpu'" in found["error"]
    assert found["variable"] == "cpuu"
    assert {row["engine"] for row in found["ops"]["cpu"].values()} == {"cpu"}


def test_a_wrong_instruction_set_is_reported_with_those_there_are() -> None:
    found = run_info(FASTGPT_CPU_ISA="mmx")
    isa, engines = found["isa"], found["engines"]
    assert isinstance(isa, dict)
    assert isinstance(engines, dict)
    assert isa["used"] is None
    assert "mmx" in isa["error"]
    assert isa["available"] == _cpu.available_isas()
    assert "mmx" in engines["unavailable"]["cpu"]
    assert {row["engine"] for row in engines["ops"]["cpu"].values()} == {"reference"}


@pytest.mark.parametrize("forced", ["", "cpu"])
def test_an_extension_that_does_not_load_is_reported(forced: str) -> None:
    found = run_info(before="import sys; sys.modules['fastgpt._cpu'] = None", FASTGPT_BACKEND=forced)
    isa, engines = found["isa"], found["engines"]
    assert isinstance(isa, dict)
    assert isinstance(engines, dict)
    assert isa["available"] == []
    assert "fastgpt._cpu" in isa["error"]
    assert "does not load" in engines["unavailable"]["cpu"]
    assert {row["engine"] for row in engines["ops"]["cpu"].values()} == {"reference"}
    assert (engines["error"] is not None) == (forced == "cpu")


def test_without_torch_it_still_names_versions_and_chip() -> None:
    found = run_info(before="import sys; sys.modules['torch'] = None")
    chip, engines, cuda = found["chip"], found["engines"], found["cuda"]
    assert isinstance(chip, dict)
    assert isinstance(engines, dict)
    assert isinstance(cuda, dict)
    assert chip["name"]
    assert found["threads"] is None
    assert engines["ops"] == {}
    assert "torch" in engines["error"]
    assert "torch does not load" in cuda["reason"]
    assert "no ops" in info.render(found)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = info.collect()
    assert found["versions"]["triton"] is None
    assert "triton      not installed" in info.render(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz\ncpu family\t: 6\n", "Intel Xeon Gold 6330 CPU @ 2.00GHz"),
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25, model 17)"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "ARM implementer 0x41 part 0xd40"),
    ],
)  # fmt: skip
def test_chip_names(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text + "\nmodel name : another core's\n")
    if "implementer" in text:
        file.write_text(text)
    assert info.chip(file) == expected


def test_a_chip_without_cpuinfo_still_has_a_name(tmp_path: Path) -> None:
    assert info.chip(tmp_path / "absent")


def test_an_unknown_option_is_a_user_error() -> None:
    with pytest.raises(UserError, match="--jsno"):
        info.main(["--jsno"])


def test_the_text_names_every_op_and_its_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for op in backend.op_names():
        row = next(line.split() for line in lines if line.split()[:1] == [op])
        assert row[1] == backend.engine_of(op)[0]
