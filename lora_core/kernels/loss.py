"""Triton kernels of the masked, weighted squared error: one launch forward, one backward.

The forward has one program for each example: fixed order, no atomics. A latent of SDXL has 65,536
elements, 16 iterations of its loop.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import FLOATS, device_refusal
from lora_core.kernels.device_functions import round_to

ROW, BLOCK = 4096, 1024  # elements of a forward iteration, of a backward program
TINY = torch.finfo(torch.float32).tiny  # area of an empty mask, as in reference.masked_mean


# ---------------------------------------------------------------- kernels


@triton.jit
def mse_kernel(
    out, target, mask, weight, losses, area, size, plane, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    """losses[i] = weight sum(m (out - target)^2) / sum(m) and area[i] = sum(m) of example i.

    m is 1 without a mask; size: elements of an example, plane: h w. Grid: examples.
    """
    i = tl.program_id(0).to(tl.int64)
    errors, masses = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        e = start + tl.arange(0, BLOCK)
        real = e < size
        found = tl.load(out + i * size + e, mask=real, other=0.0).to(tl.float32)
        wanted = tl.load(target + i * size + e, mask=real, other=0.0).to(tl.float32)
        d = found - wanted
        if mask is not None:
            m = tl.load(mask + i * plane + e % plane, mask=real, other=0.0).to(tl.float32)
            errors += m * (d * d)
            masses += m
        else:
            errors += d * d
    mass = size.to(tl.float32)
    if mask is not None:
        mass = tl.maximum(tl.sum(masses, 0), TINY)
    result = tl.sum(errors, 0) / mass
    if weight is not None:
        result *= tl.load(weight + i).to(tl.float32)
    tl.store(losses + i, result)
    tl.store(area + i, mass)


@triton.jit
def mse_backward_kernel(
    g, out, target, mask, weight, area, d_out, d_target, size, plane, BLOCK: tl.constexpr
):
    """d_out = 2 g weight m (out - target) / area, and d_target = -d_out unless it is None.

    Grid: blocks of an example's elements, examples.
    """
    i = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = e < size
    factor = 2.0 * tl.load(g + i) / tl.load(area + i)
    if weight is not None:
        factor *= tl.load(weight + i).to(tl.float32)
    found = tl.load(out + i * size + e, mask=real, other=0.0).to(tl.float32)
    wanted = tl.load(target + i * size + e, mask=real, other=0.0).to(tl.float32)
    slope = (found - wanted) * factor
    if mask is not None:
        slope *= tl.load(mask + i * plane + e % plane, mask=real, other=0.0).to(tl.float32)
    tl.store(d_out + i * size + e, round_to(slope, d_out.dtype.element_ty), mask=real)
    if d_target is not None:
        opposite = round_to(-slope, d_target.dtype.element_ty)
        tl.store(d_target + i * size + e, opposite, mask=real)


# ---------------------------------------------------------------- launches


def mse_refusal(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> str | None:
    """Why the kernels do not run on these arguments, or None."""
    reason = device_refusal(out)
    if reason is not None:
        return reason
    given = [x for x in (mask, weight) if x is not None]
    if any(x.dtype not in FLOATS for x in (out, target, *given)):
        found = f"the output is {out.dtype} and the target {target.dtype}"
        return f"{found}; there is a kernel for fp32, bf16 and fp16"
    if any(x.requires_grad for x in given):
        return "the mask or the weight requires a gradient"
    one_channel = mask is None or mask.shape == (len(out), 1, *out.shape[2:])
    if out.shape != target.shape or not out.numel() or not one_channel:
        shapes = f"{list(out.shape)} and {list(target.shape)}"
        return f"the shapes {shapes} are not an output and its target with a mask of one channel"
    return None


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """reference.snr_weighted_mse in one launch, and one in the backward.

    Arguments that are not contiguous are copied first.
    """
    mask, weight = (None if x is None else x.contiguous() for x in (mask, weight))
    return _mse(out.contiguous(), target.contiguous(), mask, weight)[0]


@torch.library.custom_op("lora_core::snr_weighted_mse", mutates_args=())
def _mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(losses, areas)  [b] each"""
    losses, area = _empty_losses(out)
    size, plane = out[0].numel(), out[0, 0].numel()
    tensors = out, target, mask, weight, losses, area
    warps = _choose_warps(out.dtype == torch.float32)
    mse_kernel[(len(out),)](*tensors, size, plane, TINY, ROW, num_warps=warps)
    return losses, area


@torch.library.custom_op("lora_core::snr_weighted_mse_backward", mutates_args=())
def _mse_back(
    g: Tensor,
    out: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    area: Tensor,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """(d_out, d_target), the second empty without `both`."""
    d_out, d_target = _empty_slopes(out, target, both)
    size, plane = out[0].numel(), out[0, 0].numel()
    grid = triton.cdiv(size, BLOCK), len(out)
    tensors = g, out, target, mask, weight, area, d_out, d_target if both else None
    mse_backward_kernel[grid](*tensors, size, plane, BLOCK, num_warps=4)
    return d_out, d_target


def _empty_losses(out: Tensor) -> tuple[Tensor, Tensor]:
    losses = out.new_empty(len(out), dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _empty_slopes(out: Tensor, target: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(target) if both else target.new_empty(0)


@_mse.register_fake
def _(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _empty_losses(out)


@_mse_back.register_fake
def _(
    g: Tensor,
    out: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    area: Tensor,
    both: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_slopes(out, target, both)


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    both = ctx.needs_input_grad[1]
    d_out, d_target = _mse_back(g.contiguous(), *ctx.saved_tensors, both)
    return d_out, d_target if both else None, None, None


_mse.register_autograd(_backward, setup_context=_save_arguments)


def _cost(out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None) -> Cost:
    masked = 0 if mask is None else mask.nbytes
    return Cost(1, out.nbytes + target.nbytes + masked + 8 * len(out))


def _cost_back(
    g: Tensor,
    out: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: Any,
    area: Tensor,
    both: bool,
) -> Cost:
    masked = 0 if mask is None else mask.nbytes
    targets = target.nbytes * (2 if both else 1)
    return Cost(1, 2 * out.nbytes + targets + masked + 8 * len(out))


COSTS["lora_core::snr_weighted_mse"] = _cost
COSTS["lora_core::snr_weighted_mse_backward"] = _cost_back


def _choose_warps(is_fp32: bool) -> int:
    """Warps of the forward kernel with which ptxas spills nothing on sm_80 to sm_100."""
    return 4 if is_fp32 else 8


# ---------------------------------------------------------------- ahead of time


def list_mse_builds(full: bool) -> list[Build]:
    """Both kernels with and without a mask; every dtype of the output in `full`."""
    dtypes = ("bf16", "fp32", "fp16") if full else ("bf16",)
    kernels = mse_kernel, mse_backward_kernel
    builds = []
    for dtype, kernel, mask in product(dtypes, kernels, (True, False)):
        builds.append(_mse_build(kernel, dtype, mask))
    return builds


def _mse_build(kernel: Any, dtype: str, mask: bool) -> Build:
    forward = kernel is mse_kernel
    constants: dict[str, Any] = {"BLOCK": ROW, "TINY": TINY} if forward else {"BLOCK": BLOCK}
    if not mask:
        constants |= dict.fromkeys(("mask", "weight", "d_target"))
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {"out": f"*{dtype}", "d_out": f"*{dtype}", "size": "i32", "plane": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    name = f"snr_weighted_mse {kernel.__name__} {dtype}{' masked' if mask else ''}"
    warps = _choose_warps(dtype == "fp32") if forward else 4
    return Build(kernel, signature, constants, warps, 3, False, name, ("size", "plane"))
