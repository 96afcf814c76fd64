"""The choice between spinning and sleeping threads."""

import os
import subprocess
import sys
import time

import pytest

from fastgpt.train import threads

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/stat is Linux's")


def test_a_busy_core_is_seen():
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        os.sched_setaffinity(0, {core})
        assert threads.busy_share(0.3) > 0.8
    finally:
        os.sched_setaffinity(0, before)
        process.kill()
        process.wait()


def test_shares_come_from_the_ticks(tmp_path, monkeypatch):
    """Of core 0 and 1, watched over 100 ticks each, one is idle and one idles or waits for the disk half of the time."""
    stat = tmp_path / "stat"

    def text(one: str, two: str) -> str:
        return f"cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 {one} 5 5\ncpu1 {two} 5 5\ncpu2 9 9 9 9 9 9 9 9 0 0\nintr 1 2\n"

    stat.write_text(text("100 0 50 1000 0 0 0 0", "100 0 50 1000 0 0 0 0"))
    monkeypatch.setattr(threads, "_STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    later = text("100 0 50 1100 0 0 0 0", "120 10 60 1040 10 5 3 2")
    monkeypatch.setattr(time, "sleep", lambda seconds: stat.write_text(later))
    assert threads.busy_share() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("share", "environment", "decided"),
    [
        (0.9, {}, True),
        (0.1, {}, False),
        (0.9, {"OMP_WAIT_POLICY": "active"}, False),
        (0.9, {"GOMP_SPINCOUNT": "9"}, False),
    ],
)
def test_only_a_busy_machine_without_a_choice_of_the_users_sleeps(monkeypatch, share, environment, decided):
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "busy_share", lambda: share)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert threads.wait_politely() is decided
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if decided else environment.get("OMP_WAIT_POLICY"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_after_torch_it_is_too_late(monkeypatch):
    import torch  # noqa: F401

    monkeypatch.setattr(threads, "busy_share", lambda: 1.0)
    assert not threads.wait_politely()
