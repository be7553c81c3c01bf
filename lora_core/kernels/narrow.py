"""Rounding on the way out of a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from lora_core.kernels.device import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x in another dtype, to the nearest, ties to even.

    By hand in Triton's interpreter, which truncates where it casts to bf16 (3.6.0, 3.7.1, 3.9.0).
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)
