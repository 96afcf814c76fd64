"""Compile the kernels of csrc/cuda with g++ against the emulation, with planted bugs that a call can switch on.

The sources are copied, with three changes: the two kinds of declaration of shared memory become calls of the emulator
(which g++ has no word for), csrc/cuda/ptx.cuh and launch.cuh are replaced by those of tests/emu/include, and each
planted bug becomes a branch beside the right code. Everything else is what nvcc sees. Results are kept by a hash of all that goes in.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"

FLAGS = {
    "": ["-O2"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address"],
}
COMMON = ["-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
COMMON += ["-Wno-unused-but-set-variable"]
_MACROS = {"": [], "thread": ["-DEMU_TSAN"], "address": ["-DEMU_ASAN"]}

_ALIGN = r"(?:(?:__align__|alignas)\s*\((\w+)\)\s+)?"
_TYPE = r"((?:const\s+|unsigned\s+)*[\w:]+(?:\s*<[^;]*?>)?)"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGN}{_TYPE}\s+(\w+)\s*\[\]\s*;")
_STATIC = re.compile(rf"__shared__\s+{_ALIGN}{_TYPE}\s+(\w+)((?:\s*\[[^;]*?\])*)\s*;")


@dataclass(frozen=True)
class Bug:
    """A bug to plant: `old`, which `file` must hold exactly once, becomes `new` when a call asks for it by `name`."""

    name: str
    file: str
    old: str
    new: str
    expression: bool = False  # `old` is an expression; else one or more whole statements that declare nothing


def translate(text: str, name: str) -> str:
    """CUDA's declarations of shared memory as calls of the emulator; line numbers stay."""
    text = _DYNAMIC.sub(r"\2* const \3 = static_cast<\2*>(emu::shared_dynamic());", text)
    text = _STATIC.sub(
        r"static char emu_key_\3; using emu_type_\3 = \2\4; "
        r"emu_type_\3& \3 = emu::shared_object<emu_type_\3>(&emu_key_\3);",
        text,
    )
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    if "__shared__" in code:
        line = next(line for line in code.splitlines() if "__shared__" in line)
        raise ValueError(f"{name}: shared memory is declared one name a declaration; got {line.strip()}")
    return text


def plant(text: str, old: str, bugs: Sequence[tuple[int, Bug]]) -> str:
    """The text with bugs (and their numbers) as branches beside the right code `old`."""
    name = bugs[0][1].name
    if text.count(old) != 1:
        raise ValueError(f"planted bug {name}: {bugs[0][1].file} holds {old!r} {text.count(old)} times, not once")
    start = text.index(old)
    end = start + len(old)
    if bugs[0][1].expression:
        chain = "".join(f"emu::planted == {number} ? ({bug.new}) : " for number, bug in bugs)
        return f"{text[:start]}({chain}({old})){text[end:]}"
    if "//" in old and "\n" not in old:  # to the end of its comment
        end = text.index("\n", start)
    chain = "".join(f"if (emu::planted == {number}) {{ {bug.new}\n}} else " for number, bug in bugs)
    return f"{text[:start]}{chain}{{ {text[start:end]}\n}}{text[end:]}"


def sources(bugs: Sequence[Bug]) -> dict[str, str]:
    """Every header of csrc/cuda and of tests/emu/kernels as g++ will see it, by name."""
    texts = {}
    for path in sorted([*KERNELS.glob("*.cuh"), *HERE.glob("kernels/*.cuh")]):
        text = path.read_text()
        places: dict[str, list[tuple[int, Bug]]] = {}
        for number, bug in enumerate(bugs, start=1):
            if bug.file == path.name:
                places.setdefault(bug.old, []).append((number, bug))
        for old, planted in places.items():
            text = plant(text, old, planted)
        texts[path.name] = f'#line 1 "{path.name}"\n' + translate(text, path.name)
    for path in HERE.glob("include/cuda/*.cuh"):
        texts[path.name] = path.read_text()
    missing = {bug.file for bug in bugs} - set(texts)
    if missing:
        raise ValueError(f"planted bugs in files that are not there: {sorted(missing)}")
    return texts


def compiler() -> str | None:
    """g++, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def _cache() -> Path:
    for folder in (ROOT / "build" / "emu", Path(tempfile.gettempdir()) / f"fastgpt-emu-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise RuntimeError("no folder to build the emulation in")


def _kept(key: str, suffix: str, make: Callable[[Path, Path], None]) -> Path:
    """The file of that key, made (in a folder of its own, then moved) where it is not there yet."""
    target = _cache() / f"{key}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            result = Path(folder) / f"result{suffix}"
            make(Path(folder), result)
            os.replace(result, target)
    return target


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _core(sanitizer: str) -> list[Path]:
    texts = [p.read_text() for p in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])]
    objects = []
    files = ["core.cpp", "hopper.cpp", "proxy.cpp", "runner.cpp" if sanitizer else "control.cpp"]
    for source in files + ["allocation.cpp"] * (sanitizer == "thread"):
        flags = ["-std=c++20", "-O2", *COMMON, *_MACROS[sanitizer], f"-I{HERE}"]

        def make(_: Path, result: Path, source: str = source, flags: list[str] = flags) -> None:
            _run([compiler() or "g++", *flags, "-c", str(HERE / source), "-o", str(result)])

        objects.append(_kept(_key(source, texts, flags), ".o", make))
    return objects


def build(binding: str, bugs: Sequence[Bug] = (), sanitizer: str = "") -> Path:
    """The library of tests/emu/bind_<binding>.cpp, or with a sanitizer ("thread", "address") its program."""
    texts = sources(bugs)
    bound = HERE / f"bind_{binding}.cpp"
    support = [p.read_text() for p in sorted([*HERE.glob("*.h"), *HERE.glob("include/*.h")])]
    needed: dict[str, str] = {}
    queue = [bound.read_text()]
    queue += [(HERE / name).read_text() for name in re.findall(r'#include "(bind_\w+\.h)"', queue[0])]
    while queue:  # only what the binding includes goes into its key
        for name in re.findall(r'#include "(?:cuda/)?(\w+\.cuh)"', queue.pop()):
            if name in texts and name not in needed:
                needed[name] = texts[name]
                queue.append(texts[name])
    flags = ["-std=c++17", *FLAGS[sanitizer], *COMMON, *_MACROS[sanitizer], "-ftrivial-auto-var-init=pattern"]
    objects = _core(sanitizer)

    def make(folder: Path, result: Path) -> None:
        (folder / "cuda").mkdir()
        for name, text in needed.items():
            (folder / "cuda" / name).write_text(text)
        command = [compiler() or "g++", *flags, f"-I{folder}", f"-I{HERE}/include", f"-I{HERE}"]
        command += ["-include", str(HERE / "emu.h"), str(bound), *map(str, objects), "-o", str(result)]
        _run([*command, "-rdynamic", "-ldl"] if sanitizer else [*command, "-shared"])

    key = _key(sorted(needed.items()), bound.read_text(), support, flags, [str(o) for o in objects])
    return _kept(key, "" if sanitizer else ".so", make)
