"""Errors of Python and torch about memory: what was asked for, what is in use. torch is not
imported: a program that has not loaded it gets no such error from it.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from lora_core.byte_sizes import format_bytes
from lora_core.memory.host_memory import installed_memory, resident_memory

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class MemoryShortage(NamedTuple):
    """Bytes of a request that was refused; 0 where a number is not known."""

    device: str  # "the GPU" or "the computer"
    asked: int
    in_use: int  # by this process
    total: int  # of the device


def read_shortage(error: BaseException) -> MemoryShortage:
    """The numbers of an error about memory, of its text and of the device."""
    text = str(error)
    asked = _find_bytes(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    if "CUDA" not in text and type(error).__name__ != "OutOfMemoryError":
        return MemoryShortage("the computer", asked, resident_memory(), installed_memory())
    total = _find_bytes(r"total capacity of ([\d.]+) (\w+)", text)
    in_use = _find_bytes(r"this process has ([\d.]+) (\w+) memory in use", text)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total = total or torch.cuda.mem_get_info()[1]
        in_use = in_use or torch.cuda.memory_reserved()
    return MemoryShortage("the GPU", asked, in_use, total)


def describe_shortage(shortage: MemoryShortage) -> str:
    """The numbers in words, without a full stop."""
    parts = []
    if shortage.asked:
        parts.append(f"{format_bytes(shortage.asked)} more were asked for")
    if shortage.in_use:
        parts.append(f"this process has {format_bytes(shortage.in_use)}")
    if shortage.total:
        parts.append(f"{shortage.device} has {format_bytes(shortage.total)}")
    return ", ".join(parts) or f"{shortage.device} has no more"


def _find_bytes(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None or found[2] not in UNITS:
        return 0
    return int(float(found[1].rstrip(".")) * UNITS[found[2]])
