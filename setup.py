"""Builds the C++ extension modules: writes one build.ninja for all of them and runs it.

setuptools' own compiler driver has no per-file flags, no header dependencies and no parallel builds within an extension; ninja has
all three. Everything static about the package stands in pyproject.toml.

Environment:
    CXX                  the C++ compiler (default g++); must accept GCC's flags
    FASTGPT_CXXFLAGS     appended to every compile line (e.g. "-Werror", "-fsanitize=address,undefined")
    FASTGPT_LDFLAGS      appended to every link line
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILE_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-unknown-pragmas -pthread"
LINK_FLAGS = "-shared -pthread -Wl,-z,relro,-z,now"

# module -> (folders of sources, extra compile flags, extra link flags)
MODULES = {
    "fastgpt._bpe": (["csrc/bpe", "csrc/python/bpe.cpp"], "", ""),
    "fastgpt._cpu": (["csrc/cpu", "csrc/python/cpu.cpp"], "-fopenmp -ffp-contract=off", "-fopenmp"),
}


def sources(places: list[str]) -> list[str]:
    """Every .cpp of the given folders and files, as paths relative to the root, sorted."""
    found = []
    for place in places:
        path = ROOT / place
        files = sorted(path.glob("*.cpp")) if path.is_dir() else [path]
        found += [str(file.relative_to(ROOT)) for file in files]
    return found


def escape(path: object) -> str:
    """A path as ninja wants it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles all extensions with one ninja run; setuptools keeps naming, in-place copies and wheels."""

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
            f"cflags = {COMPILE_FLAGS} {include_flags}",
            f"extra_cflags = {os.environ.get('FASTGPT_CXXFLAGS', '')}",
            f"ldflags = {LINK_FLAGS}",
            f"extra_ldflags = {os.environ.get('FASTGPT_LDFLAGS', '')}",
            "rule compile",
            "  command = $cxx $cflags $flags $extra_cflags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx $in -o $out $ldflags $flags $extra_ldflags",
            "  description = link $out",
        ]
        targets = []
        for extension in self.extensions:
            places, compile_flags, link_flags = MODULES[extension.name]
            objects = []
            for source in sources(places):
                target = build_dir / extension.name / f"{source}.o"
                lines += [f"build {escape(target)}: compile {escape(ROOT / source)}", f"  flags = {compile_flags}"]
                objects.append(escape(target))
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            lines += [f"build {escape(target)}: link {' '.join(objects)}", f"  flags = {link_flags}"]
            targets.append(escape(target))
        lines.append(f"default {' '.join(targets)}")
        (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")

        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build_dir)]
        if self.verbose:
            command.append("-v")
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"fastgpt: the C++ extensions did not compile (ninja exit code {error.returncode}); see the lines above"
            )


setup(
    ext_modules=[Extension(name, sources(places)) for name, (places, _, _) in MODULES.items()],
    cmdclass={"build_ext": NinjaBuild},
)
