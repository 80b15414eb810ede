"""Memory that a step frees stays with the process for the next one."""

import ctypes
import sys

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> None:
    """Has glibc reuse large blocks, where it would give them back to the kernel and ask for them again.

    A block from the kernel comes page by page, each filled with zeros at its first use: for the maps of a convolution
    that is up to a fifth of its time (docs/performance.md). The process keeps its peak of memory until it ends. With
    another C library, or another allocator in glibc's place, nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)
