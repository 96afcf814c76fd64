"""A heap that keeps its pages, and has large ones.

By default glibc maps every block of 32 MB or more anew and gives it back when it is freed, so each use of a large activation pays for
its page faults again (0.25 us for 4 KB: a 64 MB tensor costs 4 ms before anything is computed). `keep_pages` tells malloc to take large
blocks from the heap and never to shrink it, and asks Linux for pages of 2 MB there: packing a matrix for a product touches hundreds of
places in turn, more than the chip has translations of 4 KB pages for (a training step on two cores is 8 to 15 % shorter). It is a
decision for a whole process, so the trainer and the command line take it and importing the package never does. Memory that was used
once stays with the process.
"""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1  # "disables trimming completely", mallopt(3)
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 << 20  # madvise(2)


def keep_pages() -> bool:
    """Make malloc keep the pages it has, large ones where the system offers them; True where this took effect.

    Only glibc has such a switch. A second call changes nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    if kept:
        _ask_for_large_pages(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return kept


def _ask_for_large_pages(libc: ctypes.CDLL, size: int) -> None:
    """Stretch the heap by `size` bytes, which take no memory until they are used, and ask for large pages there.

    The block is freed at once and is the top of the heap from then on; a heap that may not grow so far stays as it is.
    """
    if not hasattr(libc, "madvise"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    begin = -(-block // _LARGE_PAGE) * _LARGE_PAGE
    end = (block + size) // _LARGE_PAGE * _LARGE_PAGE
    if begin < end:
        libc.madvise(begin, end - begin, _MADV_HUGEPAGE)
    libc.free(block)
