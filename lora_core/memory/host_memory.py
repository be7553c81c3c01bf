"""Memory of the computer and of this process, in bytes, as the system counts it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path


def available_memory() -> int | None:
    """Bytes that processes can still get; None where the system does not tell (not Linux)."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def installed_memory() -> int:
    """Bytes of the computer; 0 where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not tell (not Linux)."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def peak_resident_memory() -> int:
    """The most bytes that this process has held; 0 where Python has no such count (Windows)."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
