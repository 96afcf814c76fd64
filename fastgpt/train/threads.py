"""How OpenMP's threads wait for one another on a machine that has other work too.

libgomp's threads wait by spinning, which is fastest where every thread has a core. Where something else runs on the cores, the
thread that is waited for is not running, and the spinning one burns the time it needs: a training step on two threads of a busy
two-core machine was 15 times slower spinning than sleeping (466 against 7,035 tokens/s, nanoGPT's CPU model, EPYC with AVX-512).
Sleeping costs a wake-up at each parallel region instead. libgomp reads the choice once, when it is loaded, so it has to be
made before torch is imported.
"""

import os
import sys
import time
from pathlib import Path

SAMPLE_S = 0.2
BUSY_SHARE = 0.25  # of the cores this process may use

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_STAT = Path("/proc/stat")


def _ticks(cores: set[int]) -> tuple[int, int]:
    """(idle, all) clock ticks of these cores since the machine started; proc(5): user nice system idle iowait irq softirq steal."""
    idle = total = 0
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            ticks = [int(field) for field in fields[:8]]
            idle += ticks[3] + ticks[4]
            total += sum(ticks)
    return idle, total


def busy_share(seconds: float = SAMPLE_S) -> float:
    """How much of the cores that this process may use others use now, from 0 to 1, watched while this thread sleeps.

    0 where the system does not say (no /proc/stat).
    """
    if not _STAT.exists() or not hasattr(os, "sched_getaffinity"):
        return 0.0
    cores = os.sched_getaffinity(0)
    idle, total = _ticks(cores)
    time.sleep(seconds)
    idle_after, total_after = _ticks(cores)
    return 1.0 - (idle_after - idle) / (total_after - total) if total_after > total else 0.0


def wait_politely() -> bool:
    """Have OpenMP's threads sleep where the machine is busy; True where this call decided so.

    A choice in the environment (OMP_WAIT_POLICY, GOMP_SPINCOUNT) is left alone, and after torch has been imported it is too late.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _VARIABLES) or busy_share() < BUSY_SHARE:
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True
