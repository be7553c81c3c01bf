"""Keyed dropout in Triton: reference.keyed_dropout's hash in registers, the mask recomputed in the backward and never stored.

Another kernel drops the elements of its own tile in place of a launch of this one:
    key, second = row_keys(state, step, tl.load(rows + i))    # uint32, of row i; state is what `stream(seed, layer)` gives, step and rows hold int64
    kept = keep(element, key, second, threshold)              # element: row-major index inside row i, any shape that broadcasts with the keys
    x = tl.where(kept, x / (1 - p), 0.0)                      # threshold is what `threshold(p)` gives
state and threshold are uint32 that travel as int32, so that a launcher specialises on nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels import reference
from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.narrow import round_to

TYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024


# ---------------------------------------------------------------- device functions


@triton.jit
def _mix(h):
    """reference._mix on uint32, which wraps by itself."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _absorb(state, word):
    return _mix((state ^ word) + 0x9E3779B9)


@triton.jit
def row_keys(state, step, row):
    """The two uint32 keys of a row, from the int32 state of `stream`, the int64 step and the int64 key of the row."""
    key = _absorb((row * 0).to(tl.uint32) + state.to(tl.uint32), step.to(tl.uint32))
    key = _absorb(_absorb(key, row.to(tl.uint32)), (row >> 32).to(tl.uint32))
    return key, _absorb(key, 1)


@triton.jit
def keep_elements(element, key, second, threshold):
    """Whether elements are kept, bool."""
    return _mix(_mix(element.to(tl.uint32) ^ key) ^ second) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["state", "threshold"])
def dropout_kernel(x, out, step, rows, size, state, threshold, kept, BLOCK: tl.constexpr):
    """Program (i, j) does BLOCK elements of row j of x [b, size]; kept is 1 - p."""
    row = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, second = row_keys(state, tl.load(step), tl.load(rows + row))
    at = row.to(tl.int64) * size + element
    value = tl.load(x + at, mask=element < size, other=0.0).to(tl.float32)
    value = tl.where(keep_elements(element, key, second, threshold), tl.div_rn(value, kept), 0.0)
    tl.store(out + at, round_to(value, out.dtype.element_ty), mask=element < size)


# ---------------------------------------------------------------- launcher


def hash_stream(seed: int, layer: int) -> int:
    """The hash's state after seed and layer, as int32."""
    return _signed(
        reference._absorb(reference._absorb(reference._absorb(0, seed), seed >> 32), layer)
    )


def keep_threshold(p: float) -> int:
    """The least uint32 that is kept, as int32."""
    return _signed(int(p * 2**32))


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def dropout_refusal(
    x: Tensor, p: float, seed: int, layer: int, step: Tensor, rows: Tensor
) -> str | None:
    """Why the kernel does not run on these arguments, or None."""
    said = device_refusal(x)
    if said is None and x.dtype not in TYPES:
        said = f"the input is {x.dtype}; there is a kernel for fp32, bf16 and fp16"
    return "there are no elements" if said is None and not x.numel() else said


def keyed_dropout(x: Tensor, p: float, seed: int, layer: int, step: Tensor, rows: Tensor) -> Tensor:
    """reference.keyed_dropout in one launch, bit for bit on the CPU; torch on CUDA multiplies by the reciprocal of 1 - p, up to one rounding away."""
    return _dropout(x.contiguous(), step, rows, hash_stream(seed, layer), p)


@torch.library.custom_op("lora_core::keyed_dropout", mutates_args=())
def _dropout(x: Tensor, step: Tensor, rows: Tensor, state: int, p: float) -> Tensor:
    out, size = torch.empty_like(x), x[0].numel()
    dropout_kernel[(triton.cdiv(size, BLOCK), len(x))](
        x, out, step, rows, size, state, keep_threshold(p), 1 - p, BLOCK, num_warps=4
    )
    return out


@_dropout.register_fake
def _(x: Tensor, step: Tensor, rows: Tensor, state: int, p: float) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, step, rows, *ctx.rest = inputs
    ctx.save_for_backward(step, rows)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _dropout(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


_dropout.register_autograd(_backward, setup_context=_keep)
COSTS["lora_core::keyed_dropout"] = lambda x, step, rows, state, p: Cost(
    1, 2 * x.nbytes + rows.nbytes
)


def list_builds(full: bool) -> list[Build]:
    """The kernel for every dtype."""
    found = []
    for dtype in ("bf16", "fp32", "fp16") if full else ("bf16",):
        signature = {
            "x": f"*{dtype}",
            "out": f"*{dtype}",
            "step": "*i64",
            "rows": "*i64",
            "size": "i32",
            "state": "i32",
            "threshold": "i32",
        }
        signature |= {"kept": "fp32", "BLOCK": "constexpr"}
        found.append(
            Build(
                dropout_kernel,
                signature,
                {"BLOCK": BLOCK},
                name=f"keyed_dropout {dtype}",
                stages=3,
                multiples=("size",),
            )
        )
    return found
