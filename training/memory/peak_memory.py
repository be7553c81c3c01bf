"""The most memory that a run took."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lora_core.memory.memory_errors import format_bytes

TENSORS, PROCESS = "tensors on the GPU", "the process"


def measure_peak(device: torch.device) -> dict[str, Any]:
    """{"bytes": the most so far, "of": what}: of the tensors on a GPU, or on the CPU of the whole
    process, as the system counts its resident memory.
    """
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": TENSORS}
    return {"bytes": _largest_resident(), "of": PROCESS}


def describe_peak(device: torch.device) -> str:
    """The peak in words: "15.3 GB of tensors on the GPU"."""
    peak = measure_peak(device)
    return f"{format_bytes(peak['bytes'])} of {peak['of']}"


def _largest_resident() -> int:
    """Bytes; 0 on Windows, which has no such count in Python."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
