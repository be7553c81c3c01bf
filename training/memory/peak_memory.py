"""The most memory that a run took."""

from __future__ import annotations

from typing import TypedDict

import torch

from lora_core import distributed
from lora_core.byte_sizes import format_bytes
from lora_core.memory.host_memory import peak_resident_memory

TENSORS, PROCESS = "tensors on the GPU", "the process"


class PeakMemory(TypedDict):
    """The most memory so far, in bytes, and what it is the memory of."""

    bytes: int
    of: str


def measure_peak(device: torch.device) -> PeakMemory:
    """The peak of the tensors on a GPU, or on the CPU of the whole process, as the system counts
    its resident memory; with several processes, which all call this, that of the one with most.
    """
    on_gpu = device.type == "cuda"
    own = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_memory()
    most = max(distributed.gather_values(own))
    return PeakMemory(bytes=most, of=TENSORS if on_gpu else PROCESS)


def describe_peak(peak: PeakMemory) -> str:
    """The peak in words: "15.3 GB of tensors on the GPU"."""
    return f"{format_bytes(peak['bytes'])} of {peak['of']}"
