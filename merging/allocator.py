"""Memory that is freed goes back to the system, so that a long merge holds what it uses."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
APART = 1 << 20  # bytes of an allocation from which on it is mapped alone, and unmapped when freed


def return_large_blocks() -> bool:
    """Lets the C library map each allocation of APART bytes or more alone; True where it can.

    glibc raises its threshold to the largest block that was freed, up to 32 MB, and then keeps
    smaller ones in heaps of which the gaps are lost to a result that grows layer by layer: the
    exact sum of 200 files held 1.2 GB instead of 0.5. Setting a threshold stops that.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, APART) == 1
