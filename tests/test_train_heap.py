"""keep_pages: large tensors are not paged in again at each use."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
if {keep}:
    from fastgpt.train.heap import keep_pages
    assert keep_pages()
for _ in range(3):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_kept_only_when_asked_for():
    assert faults(keep=True) < 1000
    assert faults(keep=False) > 1000  # importing torch and fastgpt alone changes nothing
