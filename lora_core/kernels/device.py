"""Devices and dtypes that Triton kernels can run on."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the kernels read and write


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before the first one
    was imported.
    """
    from triton import knobs

    return bool(knobs.runtime.interpret)


# What torch.compiler.assume_constant_result does, after an import of 3 s.
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_refusal(x: Tensor) -> str | None:
    """Why no Triton kernel can run on x, or None.

    Every kernel is accepted on the meta device, where nothing is executed.
    """
    if not HAS_TRITON:
        return "triton is not installed (it exists for Linux)"
    if x.is_cuda or x.is_meta:
        return None
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if interpreted():
        return None
    return "the tensors are on the CPU; TRITON_INTERPRET=1 runs kernels there, slowly, to test them"
