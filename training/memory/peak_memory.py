"""The most memory that a run took."""

from __future__ import annotations

from typing import Any

import torch

from lora_core.byte_sizes import format_bytes
from lora_core.memory.host_memory import peak_resident_memory

TENSORS, PROCESS = "tensors on the GPU", "the process"


def measure_peak(device: torch.device) -> dict[str, Any]:
    """{"bytes": the most so far, "of": what}: of the tensors on a GPU, or on the CPU of the whole
    process, as the system counts its resident memory.
    """
    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": TENSORS}
    return {"bytes": peak_resident_memory(), "of": PROCESS}


def describe_peak(device: torch.device) -> str:
    """The peak in words: "15.3 GB of tensors on the GPU"."""
    peak = measure_peak(device)
    return f"{format_bytes(peak['bytes'])} of {peak['of']}"
