"""A heap that keeps its pages.

By default glibc maps every block of 32 MB or more anew and gives it back when it is freed, so each use of a large activation pays for
its page faults again (0.25 us for 4 KB: a 64 MB tensor costs 4 ms before anything is computed). `keep_pages` tells malloc to take large
blocks from the heap and never to shrink it. It is a decision for a whole process, so the trainer and the command line take it and
importing the package never does. Memory that was used once stays with the process.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1  # "disables trimming completely", mallopt(3)


def keep_pages() -> bool:
    """Make malloc keep the pages it has; True where this took effect (glibc), False where there is no such switch."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
