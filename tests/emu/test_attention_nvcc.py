"""What nvcc says of the attention kernels: no spill, no warning, no serialised wgmma; and what is in the machine code."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "sm80": '#include "cuda/attention_sm80_launch.cuh"\n'
    "template void fastgpt::attention::attention_fwd_sm80<T>(const Params&, cudaStream_t);\n"
    "template void fastgpt::attention::attention_bwd_sm80<T>(const Params&, cudaStream_t);\n",
    "sm90": '#include "cuda/attention_sm90_launch.cuh"\n'
    "template void fastgpt::attention::attention_fwd_sm90<T>(const Params&, int, cudaStream_t);\n",
    "sm90 backward": '#include "cuda/attention_sm90_launch.cuh"\n'
    "template void fastgpt::attention::attention_bwd_sm90<T>(const Params&, cudaStream_t);\n",
}


def compiled(folder: Path, source: str, chip: str, dtype: str) -> tuple[Path, str]:
    """The cubin of a source for a chip, and what ptxas had to say."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    text = SOURCES[source].replace("<T>", f"<{dtype}>")
    (folder / "x.cu").write_text(text.replace("template", "using namespace fastgpt::attention;\ntemplate", 1))
    command = ["nvcc", f"-gencode=arch=compute_{chip},code=sm_{chip}", "-std=c++17", "-cubin", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", f"-I{ROOT}/csrc", f"-I{ROOT}/tests/emu/nvcc", "x.cu", "-o", "x.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "x.cubin", done.stderr


def check_report(report: str, kernels: int) -> None:
    assert len(re.findall(r"Used \d+ registers", report)) == kernels
    assert len(re.findall("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)) == kernels, report
    assert not re.search(r"C7\d{3}|warning", report), report  # C75xx: wgmma serialised, setmaxnreg ignored


@pytest.mark.parametrize(("chip", "dtype"), [("80", "__half"), ("90a", "__nv_bfloat16"), ("100a", "__nv_bfloat16")])
def test_attention_sm80_compiles_without_a_spill(tmp_path: Path, chip: str, dtype: str) -> None:
    check_report(compiled(tmp_path, "sm80", chip, dtype)[1], kernels=13)


def disassembler() -> Path:
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    path = Path(found) if found else Path(str(spec and spec.origin)).parent / "backends/nvidia/bin/cuobjdump"
    if not path.exists():
        pytest.skip("needs cuobjdump")
    return path


@pytest.mark.parametrize("dtype", ["__nv_bfloat16", "__half"])
def test_attention_sm90_runs_on_the_tensor_cores_of_hopper(tmp_path: Path, dtype: str) -> None:
    cubin, report = compiled(tmp_path, "sm90", "90a", dtype)
    check_report(report, kernels=5)  # and the plan of packed sequences
    done = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    functions = [f for f in re.split(r"Function : ", done.stdout)[1:] if "fwd_sm90" in f.splitlines()[0]]
    assert len(functions) == 4
    for function in functions:
        name = function.splitlines()[0]
        dim = 128 if "Li128" in name else 64
        # S of the first step and of the loop, D / 16 each; P V of the loop and of the last step, BLOCK_N / 16 each.
        assert len(re.findall(r"\bHGMMA\.", function)) == 2 * dim // 16 + 2 * 128 // 16, name
        # A box of 64 columns each: Q, K and V (the producer's loop over K and V is unrolled), O.
        loads = len(re.findall(r"\bUTMALDG\.4D", function)) * 64 // dim
        assert loads >= 3, name
        assert loads % 2 == 1, name
        assert len(re.findall(r"\bUTMASTG\.4D", function)) == dim // 64, name
        assert len(re.findall(r"USETMAXREG", function)) == 2
        assert not re.search(r"\bHMMA\.|\b(LDL|STL)\b", function), "old tensor instructions, or local memory"


@pytest.mark.parametrize("dtype", ["__nv_bfloat16", "__half"])
def test_attention_sm90_backward_runs_on_the_tensor_cores_of_hopper(tmp_path: Path, dtype: str) -> None:
    cubin, report = compiled(tmp_path, "sm90 backward", "90a", dtype)
    check_report(report, kernels=17)  # the delta, two plans, dQ's rounding for two head sizes
    done = subprocess.run([disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    functions = [f for f in re.split(r"Function : ", done.stdout)[1:] if "bwd_sm90" in f.splitlines()[0]]
    assert len(functions) == 12
    for function in functions:
        name = function.splitlines()[0]
        dim, form = 128 if "Li128" in name else 64, re.search(r"BackwardFormE(\d)", name)
        assert form is not None
        # S and dP, D / 16 each; the sums over 64 columns, 4 each; dQ's over 128 keys, 8.
        more = {"0": 4 * 2, "1": 4, "2": 4 * 2 + 8}[form[1]]
        assert len(re.findall(r"\bHGMMA\.", function)) == 2 * dim // 16 + more, name
        assert len(re.findall(r"\bUBLKRED", function)) == int(form[1] == "2"), name
        assert re.search(r"\bUTMALDG\.4D", function)
        assert not re.search(r"\bHMMA\.|\b(LDL|STL)\b", function), "old tensor instructions, or local memory"
