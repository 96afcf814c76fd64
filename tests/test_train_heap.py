"""keep_pages: malloc does not give large blocks back, and importing the package changes nothing."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from fastgpt.train.heap import keep_pages
if {keep}:
    assert keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_kept_only_when_asked_for():
    assert faults(keep=True) < 100
    assert faults(keep=False) > 200  # 64 MB ten times, in pages of at most 2 MB


FLAGS = """
import ctypes
from fastgpt.train.heap import keep_pages
{keep}keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
place, here = libc.malloc(64 << 20) + (32 << 20), False
for line in open("/proc/self/smaps"):
    bounds = line.split()[0].split("-")
    if len(bounds) == 2:
        here = int(bounds[0], 16) <= place < int(bounds[1], 16)
    elif here and line.startswith("VmFlags:"):
        print("hg" in line.split())
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no large pages here")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_pages_are_asked_for():
    for keep in (True, False):
        code = FLAGS.format(keep="" if keep else "# ")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"{keep}\n"
