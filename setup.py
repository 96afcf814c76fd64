"""Builds the C++ extension modules: writes one build.ninja for all of them and runs it.

setuptools' own compiler driver has no per-file flags, no header dependencies and no parallel builds within an extension; ninja has
all three. Everything static about the package stands in pyproject.toml.

Environment:
    CXX                  the C++ compiler (default g++); must accept GCC's flags
    FASTGPT_CXXFLAGS     appended to every compile line (e.g. "-Werror", "-fsanitize=address,undefined")
    FASTGPT_LDFLAGS      appended to every link line
    FASTGPT_CUDA         auto (default): compile the kernels of fastgpt._cuda where nvcc is found and works, leave them to NVRTC at
                         run time where not; 0: no fastgpt._cuda; 1: nvcc is required, the install fails without it
    CUDA_HOME            the toolkit whose bin/nvcc is used (default: nvcc on the PATH)
    FASTGPT_CUDA_ARCH    the chips to compile for (default "80 90a 100a"; the first one's PTX serves newer chips)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILE_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-unknown-pragmas -pthread"
LINK_FLAGS = "-shared -pthread -Wl,-z,relro,-z,now"

# Warnings of ptxas (spilled registers, serialised wgmma) do not stop a user's install; csrc/cuda/check.py fails on them.
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden"

# module -> (folders of sources, extra compile flags, extra link flags)
MODULES: dict[str, tuple[list[str], str, str]] = {
    "fastgpt._bpe": (
        ["csrc/bpe", *(f"csrc/python/bpe{part}.cpp" for part in ("", "_decode", "_text", "_trainer"))],
        "",
        "",
    ),
    "fastgpt._cpu": (
        ["csrc/cpu", *(f"csrc/python/cpu{part}.cpp" for part in ("", "_pointwise", "_products", "_rows"))],
        "-fopenmp -ffp-contract=off",
        "-fopenmp",
    ),
}


CUDA_BINDINGS = [
    "csrc/python/cuda.cpp",
    "csrc/python/cuda_attention.cpp",
    "csrc/python/cuda_compiler.cpp",
    "csrc/python/cuda_memory.cpp",
]
# Without nvcc: the same launchers for the C++ compiler, kernels without bodies that NVRTC compiles at their first use. A kernel is
# found by its symbol, so symbols are kept visible and empty functions apart.
NVRTC_FLAGS = "-DFASTGPT_NVRTC -fvisibility=default -fno-ipa-icf -Wno-unused-parameter"


def find_nvcc() -> tuple[str, Path] | str:
    """nvcc and the toolkit's root, which nvcc itself names (on the PATH may lie a link or a script); or why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        return f"no nvcc in {home}/bin" if home else "no nvcc on the PATH"
    # A compile that produces nothing: it also says whether nvcc likes the C++ compiler that is here.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    root = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    if plan.returncode != 0 or root is None:
        return f"{nvcc} does not work: {(plan.stderr.strip() or 'no output').splitlines()[-1]}"
    return nvcc, Path(root[1].strip()).resolve()


def cuda_wanted() -> str:
    """FASTGPT_CUDA, checked."""
    wanted = os.environ.get("FASTGPT_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"fastgpt: FASTGPT_CUDA is {wanted!r}, expected 0, 1 or auto")
    return wanted


WANTED = cuda_wanted()
NVCC = find_nvcc() if WANTED != "0" else "FASTGPT_CUDA=0"
if isinstance(NVCC, str):
    if WANTED == "1":
        sys.exit(f"fastgpt: FASTGPT_CUDA=1 asks for the CUDA kernels, but there is {NVCC}")
    if WANTED == "0":
        print(f"fastgpt: built without the CUDA kernels: {NVCC}", file=sys.stderr)
    else:
        print(f"fastgpt: NVRTC will compile the CUDA kernels at their first use: {NVCC}", file=sys.stderr)
        MODULES["fastgpt._cuda"] = (["csrc/cuda", "csrc/nvrtc", *CUDA_BINDINGS], NVRTC_FLAGS, "-ldl -Wl,-Bsymbolic")
else:
    library = next(
        (d for d in ("lib64", "targets/x86_64-linux/lib", "lib") if (NVCC[1] / d / "libcudart_static.a").exists()),
        "lib64",
    )
    MODULES["fastgpt._cuda"] = (
        ["csrc/cuda", *CUDA_BINDINGS],
        "",
        f"{shlex.quote(str(NVCC[1] / library / 'libcudart_static.a'))} -ldl -lrt",
    )


def device_code() -> str:
    """nvcc's flags for machine code of every architecture, and PTX of the first for chips that are newer than all."""
    names = (os.environ.get("FASTGPT_CUDA_ARCH") or "80 90a 100a").split()
    if not names or not all(re.fullmatch(r"\d+[af]?", name) for name in names):
        sys.exit(f"fastgpt: FASTGPT_CUDA_ARCH is {' '.join(names)!r}, expected numbers such as '80 90a 100a'")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return " ".join([*codes, f"-gencode=arch=compute_{names[0]},code=compute_{names[0]}"])


def device_flags(source: str) -> str:
    """Flags of one .cu file. A name that ends in _sm90 or _sm90_backward: instructions that no other chip has, so one machine code."""
    return "-gencode=arch=compute_90a,code=sm_90a" if "_sm90" in Path(source).name else device_code()


def sources(places: list[str]) -> list[str]:
    """Every .cpp and .cu of the given folders and files, as paths relative to the root, sorted."""
    found = []
    for place in places:
        path = ROOT / place
        files = sorted([*path.glob("*.cpp"), *path.glob("*.cu")]) if path.is_dir() else [path]
        found += [str(file.relative_to(ROOT)) for file in files]
    return found


def escape(path: object) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja run; setuptools keeps naming, in-place copies and wheels."""

    host_view_written = False

    def host_view(self, build_dir: Path) -> str:
        """Flags by which a C++ compiler finds CUDA's words and csrc/cuda without device code, which is written on the way."""
        view = build_dir / "host_view"
        if not self.host_view_written:
            subprocess.run([sys.executable, str(ROOT / "csrc" / "nvrtc" / "host_view.py"), str(view)], check=True)
            self.host_view_written = True
        return " ".join(f"-I{shlex.quote(str(path))}" for path in (ROOT / "csrc" / "nvrtc" / "include", view))

    def build_extensions(self) -> None:
        import ninja
        import pybind11

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        includes = [ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
        include_flags = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"cflags = {COMPILE_FLAGS}",
            f"includes = {include_flags}",
            f"extra_cflags = {os.environ.get('FASTGPT_CXXFLAGS', '')}",
            f"ldflags = {LINK_FLAGS}",
            f"extra_ldflags = {os.environ.get('FASTGPT_LDFLAGS', '')}",
            f"nvcc = {NVCC if isinstance(NVCC, str) else shlex.quote(NVCC[0])}",
            f"nvccflags = {NVCC_FLAGS} -ccbin $cxx {include_flags}",
            "rule compile",
            "  command = $cxx $cflags $flags $includes $extra_cflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule compile_device",
            "  command = $nvcc $nvccflags $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx $in -o $out $ldflags $flags $extra_ldflags",
            "  description = link $out",
        ]
        targets: dict[str, Path] = {}
        for extension in self.extensions:
            places, compile_flags, link_flags = MODULES[extension.name]
            objects = []
            for source in sources(places):
                target = build_dir / extension.name / f"{source}.o"
                rule, flags = "compile", compile_flags
                if source.endswith(".cu") and isinstance(NVCC, str):
                    flags = f"-x c++ {compile_flags} {self.host_view(build_dir)}"
                elif source.endswith(".cu"):
                    rule, flags = "compile_device", device_flags(source)
                elif extension.name == "fastgpt._cuda" and isinstance(NVCC, str):
                    flags = f"{compile_flags} {self.host_view(build_dir)}"
                lines += [f"build {escape(target)}: {rule} {escape(ROOT / source)}", f"  flags = {flags}"]
                objects.append(escape(target))
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines += [f"build {escape(target)}: link {' '.join(objects)}", f"  flags = {link_flags}"]
            targets[extension.name] = target
        lines.append(f"default {' '.join(map(escape, targets.values()))}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")

        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build_dir)]
        if self.verbose:
            command.append("-v")
        # All at once, so that no core waits; where that fails, the rest is built without what is optional.
        if subprocess.run([*command, "-k", "0"]).returncode == 0:
            return
        optional = [extension for extension in self.extensions if extension.optional]
        required = [str(targets[extension.name]) for extension in self.extensions if not extension.optional]
        done = subprocess.run([*command, *required])
        if done.returncode != 0:
            sys.exit(
                f"fastgpt: the C++ extensions did not compile (ninja exit code {done.returncode}); see the lines above"
            )
        for extension in optional:
            if not targets[extension.name].exists():
                print(
                    f"fastgpt: {extension.name} did not compile and is left out; see the lines above", file=sys.stderr
                )
                self.extensions.remove(extension)


setup(
    ext_modules=[
        Extension(name, sources(places), optional=name == "fastgpt._cuda" and WANTED == "auto")
        for name, (places, _, _) in MODULES.items()
    ],
    cmdclass={"build_ext": NinjaBuild},
)
