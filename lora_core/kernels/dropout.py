"""Triton kernel of keyed dropout: the hash of reference.keyed_dropout, computed in registers.

The mask is recomputed in the backward and never stored. Another kernel can apply dropout to its own
tile instead of a launch of this one:

    key, second = row_keys(state, step, tl.load(rows + i))  # uint32, of row i
    kept = keep_elements(element, key, second, threshold)   # element: row-major index inside row i
    x = tl.where(kept, x / (1 - p), 0.0)

with state = `hash_stream(seed, layer)`, threshold = `keep_threshold(p)`, int64 step and rows, and
row_keys and keep_elements of device_functions. state and threshold are uint32 passed as int32,
without specialization.
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
from lora_core.kernels.device import FLOATS, device_refusal
from lora_core.kernels.device_functions import keep_elements, round_to, row_keys

BLOCK = 1024


@triton.jit(do_not_specialize=["state", "threshold"])
def dropout_kernel(x, out, step, rows, size, state, threshold, kept, BLOCK: tl.constexpr):
    """Dropout of x [b, size]. Program (i, j) does BLOCK elements of row j; kept is 1 - p."""
    row = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, second = row_keys(state, tl.load(step), tl.load(rows + row))
    at = row.to(tl.int64) * size + element
    value = tl.load(x + at, mask=element < size, other=0.0).to(tl.float32)
    chosen = keep_elements(element, key, second, threshold)
    value = tl.where(chosen, tl.div_rn(value, kept), 0.0)
    tl.store(out + at, round_to(value, out.dtype.element_ty), mask=element < size)


def hash_stream(seed: int, layer: int) -> int:
    """The hash's state after seed and layer, as int32."""
    state = reference.hash_word(reference.hash_word(0, seed), seed >> 32)
    return _to_int32(reference.hash_word(state, layer))


def keep_threshold(p: float) -> int:
    """The smallest hash (uint32) whose element is kept, as int32."""
    return _to_int32(int(p * 2**32))


def _to_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def dropout_refusal(
    x: Tensor, p: float, seed: int, layer: int, step: Tensor, rows: Tensor
) -> str | None:
    """Why the kernel does not run on these arguments, or None."""
    reason = device_refusal(x)
    if reason is None and x.dtype not in FLOATS:
        reason = f"the input is {x.dtype}; there is a kernel for fp32, bf16 and fp16"
    return "there are no elements" if reason is None and not x.numel() else reason


def keyed_dropout(x: Tensor, p: float, seed: int, layer: int, step: Tensor, rows: Tensor) -> Tensor:
    """reference.keyed_dropout in one launch, bit for bit equal to the reference on the CPU.

    On CUDA the reference multiplies by the reciprocal of 1 - p, up to one rounding away.
    """
    return _dropout(x.contiguous(), step, rows, hash_stream(seed, layer), p)


@torch.library.custom_op("lora_core::keyed_dropout", mutates_args=())
def _dropout(x: Tensor, step: Tensor, rows: Tensor, state: int, p: float) -> Tensor:
    out, size = torch.empty_like(x), x[0].numel()
    grid = triton.cdiv(size, BLOCK), len(x)
    threshold = keep_threshold(p)
    dropout_kernel[grid](x, out, step, rows, size, state, threshold, 1 - p, BLOCK, num_warps=4)
    return out


@_dropout.register_fake
def _(x: Tensor, step: Tensor, rows: Tensor, state: int, p: float) -> Tensor:
    return torch.empty_like(x)


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, step, rows, *ctx.rest = inputs
    ctx.save_for_backward(step, rows)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return _dropout(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _cost(x: Tensor, step: Tensor, rows: Tensor, state: int, p: float) -> Cost:
    return Cost(1, 2 * x.nbytes + rows.nbytes)


_dropout.register_autograd(_backward, setup_context=_save_keys)
COSTS["lora_core::keyed_dropout"] = _cost


def list_dropout_builds(full: bool) -> list[Build]:
    """The kernel for every dtype."""
    found = []
    for dtype in ("bf16", "fp32", "fp16") if full else ("bf16",):
        signature = {"x": f"*{dtype}", "out": f"*{dtype}", "step": "*i64", "rows": "*i64"}
        signature |= {"size": "i32", "state": "i32", "threshold": "i32", "kept": "fp32"}
        order = {name: signature.get(name, "constexpr") for name in dropout_kernel.arg_names}
        name = f"keyed_dropout {dtype}"
        constants = {"BLOCK": BLOCK}
        found.append(
            Build(dropout_kernel, order, constants, stages=3, name=name, multiples=("size",))
        )
    return found
