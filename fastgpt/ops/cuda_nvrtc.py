"""The kernels of csrc/cuda compiled at first use by NVRTC, where the package was installed without nvcc.

The sources are the same files, which travel in the wheel (`fastgpt.cuda_sources`). A kernel is compiled for the device's own
architecture when it is first launched, about a second each, and kept on disk under a hash of its source, the headers it includes, the
architecture, the options and NVRTC's version, so that a change of any of them compiles anew and an old file is never taken for it.

NVRTC and CUDA's headers come with torch's CUDA wheels (nvidia-cuda-nvrtc, nvidia-cuda-runtime) or with a toolkit. Importing this module
needs neither; nothing of it needs a GPU.

Environment: FASTGPT_NVRTC, the path of libnvrtc.so, where it is not found; CUDA_HOME, a toolkit; FASTGPT_CACHE, the folder of what was
compiled (default: fastgpt in XDG_CACHE_HOME or ~/.cache).
"""

import ctypes
import functools
import glob
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_CHIPS_WITH_OWN_CODE = {(9, 0): "90a", (10, 0): "100a"}  # wgmma and its like exist for these exact chips
# -default-device: the headers also declare the launchers, which NVRTC would refuse as host functions.
OPTIONS = ("--std=c++20", "-default-device")


class NvrtcError(RuntimeError):
    """NVRTC is not there, or refused a source; the message holds its log."""


@functools.cache
def sources() -> Path:
    """The folder with the kernels' headers: in the installed package, else in the checkout.

    Raises:
        NvrtcError: neither is there.
    """
    spec = importlib.util.find_spec("fastgpt")
    package = Path(str(spec and spec.origin)).parent
    for folder in (package / "cuda_sources", package.parent / "csrc" / "cuda"):
        if (folder / "ptx.cuh").exists():
            return folder
    raise NvrtcError(f"the sources of the CUDA kernels are not in {package}")


def _places(pattern: str) -> list[str]:
    """Matches of a pattern in the folders of NVIDIA's wheels and of a toolkit."""
    found: list[str] = []
    for folder in sys.path:
        found += sorted(glob.glob(os.path.join(folder or ".", "nvidia", "*", pattern)), reverse=True)
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            found += glob.glob(os.path.join(home, pattern)) + glob.glob(
                os.path.join(home, pattern.replace("lib/", "lib64/"))
            )
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """libnvrtc, loaded.

    Raises:
        NvrtcError: it is not found, or does not load.
    """
    named = os.environ.get("FASTGPT_NVRTC")
    names = (
        [named] if named else [*_places("lib/libnvrtc.so.1[0-9]"), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    )
    reasons = []
    for name in names:
        try:
            # It looks for its libnvrtc-builtins beside itself only if that is loaded or on the path.
            for builtins in glob.glob(os.path.join(os.path.dirname(name), "libnvrtc-builtins.so*"))[:1]:
                ctypes.CDLL(builtins)
            nvrtc = ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
            continue
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        return nvrtc
    raise NvrtcError(f"no NVRTC (pip install nvidia-cuda-nvrtc, or FASTGPT_NVRTC=<libnvrtc.so>): {reasons[0]}")


@functools.cache
def include_folder() -> Path:
    """The folder of cuda_bf16.h.

    Raises:
        NvrtcError: there is none.
    """
    for path in _places("include/cuda_bf16.h"):
        return Path(path).parent
    raise NvrtcError("no CUDA headers: cuda_bf16.h is in no wheel (nvidia-cuda-runtime) and no toolkit (CUDA_HOME)")


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None where it can."""
    try:
        library(), include_folder(), sources()
    except NvrtcError as error:
        return str(error)
    return None


def version() -> str:
    """NVRTC's version, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return f"{major.value}.{minor.value}"


def architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for: with the instructions of that very chip, where the kernels use them.

    >>> architecture((9, 0)), architecture((8, 6))
    ('sm_90a', 'sm_86')
    """
    return "sm_" + _CHIPS_WITH_OWN_CODE.get(capability, "{}{}".format(*capability))


@functools.cache
def _texts() -> dict[str, str]:
    return {f"cuda/{path.name}": path.read_text() for path in sorted(sources().glob("*.cuh"))}


# NVRTC has no C++ library of its own; the kernels want no more of it than this.
_STANDARD = {
    "cstdint": """#pragma once
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
namespace std {
using ::int8_t; using ::int16_t; using ::int32_t; using ::int64_t;
using ::uint8_t; using ::uint16_t; using ::uint32_t; using ::uint64_t; using ::uintptr_t;
}
""",
    "type_traits": """#pragma once
namespace std {
template <class A, class B> constexpr bool is_same_v = false;
template <class A> constexpr bool is_same_v<A, A> = true;
template <bool b, class A, class B> struct conditional { using type = A; };
template <class A, class B> struct conditional<false, A, B> { using type = B; };
template <bool b, class A, class B> using conditional_t = typename conditional<b, A, B>::type;
}
""",
    "cmath": "#pragma once\n#ifndef INFINITY\n#define INFINITY __int_as_float(0x7f800000)\n#endif\n",
    # The driver's own header wants a C library; of it the kernels take this one type, as an argument.
    "cuda.h": """#pragma once
struct alignas(64) CUtensorMap_st { unsigned long long opaque[16]; };
typedef CUtensorMap_st CUtensorMap;
""",
    "cfloat": "#pragma once\n#define FLT_MAX 3.402823466e+38f\n#define FLT_MIN 1.175494351e-38f\n",
}
_PRELUDE = "#include <cstdint>\n#include <cmath>\n"


def home_of(kernel: str) -> str:
    """The header, as the sources include it, that defines a kernel.

    Args:
        kernel: its name without namespaces and template arguments.

    Raises:
        NvrtcError: none does, or several do.

    >>> home_of("dropout_kernel")
    'cuda/dropout.cuh'
    """
    pattern = re.compile(rf"__global__[^;{{]*?\b{re.escape(kernel)}\s*\(")
    found = [name for name, text in _texts().items() if pattern.search(text)]
    if len(found) != 1:
        raise NvrtcError(f"kernel {kernel}: expected one header of {sources()} that defines it, got {found}")
    return found[0]


def _needed(header: str) -> dict[str, str]:
    """A header and all that it includes of the kernels' own."""
    needed: dict[str, str] = {}
    queue = [header]
    while queue:
        name = queue.pop()
        if name in needed:
            continue
        needed[name] = _texts()[name]
        queue += re.findall(r'^#include "(cuda/\w+\.cuh)"', needed[name], re.MULTILINE)
    return needed


def cache_folder() -> Path:
    """Where compiled kernels are kept; made if it is not there."""
    given = os.environ.get("FASTGPT_CACHE")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
    folder = base / "nvrtc"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kernel(expression: str, arch: str) -> tuple[str, bytes]:
    """A kernel's name in machine code and the machine code (a cubin), from disk or compiled now.

    Args:
        expression: the kernel as C++ names it, with namespaces and template arguments.
        arch: as `architecture` gives it.

    Raises:
        NvrtcError: no such kernel, no NVRTC, or NVRTC refuses the source (with its log).

    >>> name, cubin = kernel("fastgpt::cuda::dropout_kernel<float, float, true>", "sm_80")  # doctest: +SKIP
    """
    header = home_of(re.sub(r"<.*", "", expression, flags=re.DOTALL).split("::")[-1])
    needed = _needed(header)
    parts = (expression, arch, version(), str(include_folder()), OPTIONS, _PRELUDE, _STANDARD, sorted(needed.items()))
    path = cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.cubin"
    try:
        name, _, cubin = path.read_bytes().partition(b"\n")
    except OSError:
        name, cubin = _compile(f'{_PRELUDE}#include "{header}"\n', needed, expression, arch)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # whole or not at all, also for others
            file.write(name + b"\n" + cubin)
        os.replace(file.name, path)
    return name.decode(), cubin


def _check(code: int, what: str, log: str = "") -> None:
    if code != 0:
        raise NvrtcError(f"{what}: {library().nvrtcGetErrorString(code).decode()}{log and chr(10) + log}")


def _strings(texts: Sequence[str]) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _compile(program_text: str, headers: dict[str, str], expression: str, arch: str) -> tuple[bytes, bytes]:
    nvrtc, program = library(), ctypes.c_void_p()
    headers = headers | _STANDARD
    options = [*OPTIONS, f"--gpu-architecture={arch}", f"--include-path={include_folder()}"]
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), program_text.encode(), b"kernel.cu", len(headers), _strings(list(headers.values())),
        _strings(list(headers)),
    )  # fmt: skip
    _check(created, "nvrtcCreateProgram")
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()), expression)
        done = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
        size = ctypes.c_size_t()
        if done != 0:
            _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
            log = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
            _check(done, f"{expression} for {arch}", log.value.decode(errors="replace")[-4000:])
        name = ctypes.c_char_p()
        _check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)), "nvrtcGetLoweredName")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return bytes(name.value or b""), cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
