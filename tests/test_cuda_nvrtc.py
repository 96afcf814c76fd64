"""The CUDA kernels without nvcc: what NVRTC makes of the sources, what is kept of it, and how the launchers use it.

No GPU is needed: the driver is tests/cuda_driver.cpp, which records what it is asked.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from paths import ROOT

from fastgpt.ops import cuda_nvrtc

CSRC = ROOT / "csrc"
compiles = pytest.mark.skipif(cuda_nvrtc.unavailable() is not None, reason=str(cuda_nvrtc.unavailable()))
KERNELS = [
    ("fastgpt::cuda::dropout_kernel<float, __half, true>", "sm_80"),
    ("fastgpt::cuda::softmax_pass_kernel<__nv_bfloat16, 1>", "sm_86"),
    ("fastgpt::cuda::activation_kernel<__nv_bfloat16, false, (fastgpt::cuda::Activation)3>", "sm_90a"),
    ("fastgpt::cuda::norm_backward_row_kernel<float, float, 256, 1>", "sm_80"),
    ("fastgpt::cuda::cross_entropy_row_kernel<float, 256, 4>", "sm_90a"),
    ("fastgpt::cuda::adamw_kernel<__half>", "sm_100a"),
    ("fastgpt::attention::attention_bwd_kv_sm80_kernel<__nv_bfloat16, 64>", "sm_100a"),
    ("fastgpt::attention::attention_decode_merge_kernel<__half>", "sm_80"),
    ("fastgpt::attention::attention_fwd_sm90_kernel<__half, 128, false>", "sm_90a"),
]


def load_host_view():
    spec = importlib.util.spec_from_file_location("fastgpt_host_view", CSRC / "nvrtc" / "host_view.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nvrtc"


@compiles
@pytest.mark.parametrize(("expression", "arch"), KERNELS)
def test_kernels_compile_to_machine_code_that_holds_them(cache, expression, arch):
    name, cubin = cuda_nvrtc.kernel(expression, arch)
    assert cubin.startswith(b"\x7fELF")
    assert f".text.{name}".encode() in cubin
    assert expression.split("::")[2].split("<")[0] in name


@compiles
def test_what_was_compiled_is_kept_and_a_changed_source_is_compiled_anew(cache, monkeypatch):
    compiled = []
    real = cuda_nvrtc._compile
    monkeypatch.setattr(cuda_nvrtc, "_compile", lambda *args: compiled.append(args[3]) or real(*args))
    kernel = KERNELS[0][0]
    first = cuda_nvrtc.kernel(kernel, "sm_80")
    assert cuda_nvrtc.kernel(kernel, "sm_80") == first
    assert compiled == ["sm_80"]
    cuda_nvrtc.kernel(kernel, "sm_86")
    assert compiled == ["sm_80", "sm_86"]
    texts = cuda_nvrtc._texts()
    monkeypatch.setattr(cuda_nvrtc, "_texts", lambda: texts | {"cuda/dtype.cuh": texts["cuda/dtype.cuh"] + "\n"})
    cuda_nvrtc.kernel(kernel, "sm_80")  # a header that the kernel's own includes
    assert compiled == ["sm_80", "sm_86", "sm_80"]
    monkeypatch.setattr(cuda_nvrtc, "_texts", lambda: texts | {"cuda/softmax.cuh": ""})
    cuda_nvrtc.kernel(kernel, "sm_80")  # one that it does not include
    assert len(compiled) == 3
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(cuda_nvrtc, "version", lambda: "1.2")
    cuda_nvrtc.kernel(kernel, "sm_80")
    assert len(compiled) == 4


@compiles
def test_a_source_that_nvrtc_refuses_raises_with_its_log(cache):
    with pytest.raises(cuda_nvrtc.NvrtcError, match=r"for sm_80.*\n.*error"):
        cuda_nvrtc.kernel("fastgpt::cuda::dropout_kernel<Nothing, float, true>", "sm_80")
    assert not list(cache.iterdir())


def test_an_unknown_kernel_raises():
    with pytest.raises(cuda_nvrtc.NvrtcError, match="kernel no_such_kernel: expected one header"):
        cuda_nvrtc.kernel("fastgpt::cuda::no_such_kernel<float>", "sm_80")


def test_every_kernel_has_one_home():
    view = load_host_view()
    for path in sorted((CSRC / "cuda").glob("*.cuh")):
        for name in view.kernels(path.read_text()):
            assert cuda_nvrtc.home_of(name) == f"cuda/{path.name}"


def test_no_nvrtc_is_said_and_not_needed_for_the_import(tmp_path):
    code = "from fastgpt.ops import cuda_nvrtc; print(cuda_nvrtc.unavailable())"
    variables = os.environ | {"FASTGPT_NVRTC": str(tmp_path / "none.so"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert "no NVRTC (pip install nvidia-cuda-nvrtc" in done.stdout
    assert "none.so" in done.stdout


def test_the_architecture_is_the_devices_own():
    assert [cuda_nvrtc.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120",
    ]  # fmt: skip


def test_the_host_view_keeps_what_the_host_needs():
    text = textwrap.dedent("""\
        struct S { __device__ S(int n) : a(n) { f(); }
          __host__ __device__ int count() const { return a; }
          int a; };  // a { brace
        template <class T> __global__ void __launch_bounds__(128) k(S s) {
          if (s.a) { g("}"); }
        }
        __device__ int g(const char*);
        inline int h() { return 1; }
        """)
    seen = load_host_view().host_view(text)
    assert seen.count("\n") == text.count("\n")
    assert "f()" not in seen
    assert "if (s.a)" not in seen
    assert "return a" in seen
    assert "return 1" in seen
    assert load_host_view().kernels(text) == ["k"]


@pytest.fixture(scope="module")
def launchers(tmp_path_factory):
    """The launchers as a C++ compiler without CUDA makes them, and the driver that records."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("nvrtc")
    load_host_view().write(folder)
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-fno-ipa-icf",
        f"-I{CSRC}/nvrtc/include",
        f"-I{folder}",
        f"-I{CSRC}",
    ]
    sources = [*(CSRC / "cuda" / f"{name}.cu" for name in ("dropout", "device", "attention_sm90"))]
    sources += [CSRC / "nvrtc" / "driver.cpp", ROOT / "tests" / "nvrtc_launch.cpp"]
    subprocess.run(
        ["g++", *flags, "-w", "-x", "c++", *map(str, sources), "-o", folder / "launchers.so", "-ldl"], check=True
    )
    driver = [ROOT / "tests" / "cuda_driver.cpp", "-o", folder / "driver.so"]
    subprocess.run(["g++", "-fPIC", "-shared", *map(str, driver)], check=True)
    return folder


RUN = """
import ctypes, sys
from fastgpt.ops import cuda_nvrtc
lib = ctypes.CDLL(sys.argv[1])
for name in ("test_dropout", "test_attention", "test_why_no_device"):
    getattr(lib, name).restype = ctypes.c_char_p
lib.test_dropout.argtypes = [ctypes.c_int, ctypes.c_ulonglong, ctypes.c_longlong, ctypes.c_ulonglong]
asked, kept = [], []
def compile(expression, major, minor, code, size):
    asked.append(expression.decode())
    name, cubin = cuda_nvrtc.kernel(expression.decode(), cuda_nvrtc.architecture((major, minor)))
    kept.append((name.encode(), ctypes.create_string_buffer(cubin, len(cubin))))
    code[0], size[0] = ctypes.addressof(kept[-1][1]), len(cubin)
    return ctypes.cast(ctypes.c_char_p(kept[-1][0]), ctypes.c_void_p).value
kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int,
                        ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t))
callback = kind(compile)
lib.test_set_compiler(callback)
print(lib.test_why_no_device())
print(lib.test_dropout(1, 8192, 5000, 7))
print(lib.test_dropout(1, 8192, 1, 7))
print(lib.test_dropout(0, 8194, 1, 7))
print(lib.test_attention(300))
print(asked)
"""


def run_launchers(folder: Path, cache: Path, program: str = RUN, **environment: str) -> list[str]:
    variables = os.environ | {"FASTGPT_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, "-P", "-c", program, str(folder / "launchers.so")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@compiles
def test_launchers_compile_load_and_launch(launchers, tmp_path):
    log = tmp_path / "log"
    recorded = {"FASTGPT_CUDA_DRIVER": str(launchers / "driver.so"), "FASTGPT_TEST_DRIVER_LOG": str(log)}
    lines = run_launchers(launchers, tmp_path, FASTGPT_TEST_CHIP="90", **recorded)
    assert lines[:5] == ["None"] * 5
    assert eval(lines[5]) == [  # each kernel once
        "fastgpt::cuda::dropout_kernel<__nv_bfloat16, __nv_bfloat16, true>",
        "fastgpt::cuda::dropout_kernel<float, float, false>",  # not aligned
        "fastgpt::attention::attention_fwd_sm90_kernel<__nv_bfloat16, 64, false>",
    ]
    steps = [line.split() for line in log.read_text().splitlines()]
    assert [step[0] for step in steps] == [
        "load",
        "launch",
        "launch",
        "load",
        "launch",
        *["map"] * 4,
        "load",
        "attribute",
        "launch",
    ]
    wide, narrow = steps[1], steps[2]
    assert wide[1] == narrow[1]
    # grid, block, shared memory, stream, the struct's first pointer
    assert wide[2:] == ["5", "1", "1", "256", "1", "1", "0", "7", "4096"]
    assert narrow[2:] == ["1", "1", "1", "256", "1", "1", "0", "7", "4096"]
    assert steps[5] == ["map", "9", "4"]  # bf16, four dimensions
    assert steps[10][1] == "8"  # more than 48 KB, as many as the launch asks for
    assert steps[11][2:9] == ["6", "1", "1", "384", "1", "1", steps[10][2]]


@compiles
def test_a_thread_without_a_context_gets_the_first_devices(launchers, tmp_path):
    """As with the runtime; a thread that has called nothing of CUDA has none."""
    recorded = {"FASTGPT_CUDA_DRIVER": str(launchers / "driver.so"), "FASTGPT_TEST_DRIVER_LOG": str(tmp_path / "log")}
    lines = run_launchers(launchers, tmp_path, FASTGPT_TEST_CHIP="90", FASTGPT_TEST_NO_CONTEXT="1", **recorded)
    assert lines[:5] == ["None"] * 5


@compiles
def test_a_compile_holds_up_no_other_threads_launch(launchers, tmp_path):
    """The compiler is Python code and gives up Python's lock: a thread that waited with it for ours would never return."""
    recorded = {"FASTGPT_CUDA_DRIVER": str(launchers / "driver.so"), "FASTGPT_TEST_DRIVER_LOG": str(tmp_path / "log")}
    other = (
        "def compile(expression, major, minor, code, size):\n"
        "    if asked:\n"
        "        import threading\n"
        "        thread = threading.Thread(target=lib.test_dropout, args=(1, 8192, 5000, 7), daemon=True)\n"
        "        thread.start(), thread.join(20)\n"
        "        print('waits' if thread.is_alive() else 'runs', flush=True)\n"
    )
    program = RUN.replace("def compile(expression, major, minor, code, size):\n", other)
    lines = run_launchers(launchers, tmp_path, program, FASTGPT_TEST_CHIP="90", **recorded)
    assert lines.count("runs") == 2
    assert "waits" not in lines


@compiles
def test_a_refused_launch_raises_with_the_kernels_name(launchers, tmp_path):
    recorded = {"FASTGPT_CUDA_DRIVER": str(launchers / "driver.so"), "FASTGPT_TEST_DRIVER_LOG": str(tmp_path / "log")}
    lines = run_launchers(launchers, tmp_path, FASTGPT_TEST_CHIP="90", FASTGPT_TEST_FAIL="1", **recorded)
    assert "dropout_kernel<__nv_bfloat16, __nv_bfloat16, true>: unspecified launch failure" in lines[1]


def test_without_a_driver_it_says_so(launchers, tmp_path):
    lines = run_launchers(launchers, tmp_path, FASTGPT_CUDA_DRIVER=str(tmp_path / "none.so"))
    assert "there is no CUDA driver" in lines[0]
    assert "dropout_kernel<__nv_bfloat16, __nv_bfloat16, true>: there is no CUDA driver" in lines[1]
    assert lines[5] == "[]"
