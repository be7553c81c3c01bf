"""The masked, weighed squared error in Triton: one launch forward, one backward.

One program does a row: fixed order, no atomics. A latent of SDXL has 65,536 elements a row, 16 turns of its loop.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.ahead import Build
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.device import device_refusal
from lora_core.kernels.narrow import round_to

TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW, BLOCK = 4096, 1024  # elements of a turn of the forward, of a program of the backward
TINY = torch.finfo(torch.float32).tiny  # of an empty mask, as in losses.masked_mean


@triton.jit
def forward_kernel(
    out, target, mask, weight, rows, area, size, plane, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    """rows[i] = weight sum(m (out - target)^2) / sum(m) and area[i] = sum(m) over the elements of row i; plane is h w, m is 1 without a mask."""
    i = tl.program_id(0).to(tl.int64)
    errors, masses = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        e = start + tl.arange(0, BLOCK)
        d = tl.load(out + i * size + e, mask=e < size, other=0.0).to(tl.float32) - tl.load(
            target + i * size + e, mask=e < size, other=0.0
        ).to(tl.float32)
        if mask is not None:
            m = tl.load(mask + i * plane + e % plane, mask=e < size, other=0.0).to(tl.float32)
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
    tl.store(rows + i, result)
    tl.store(area + i, mass)


@triton.jit
def backward_kernel(
    g, out, target, mask, weight, area, d_out, d_target, size, plane, BLOCK: tl.constexpr
):
    """d_out = 2 g weight m (out - target) / area and, where it is asked for, d_target = -d_out."""
    i = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor = 2.0 * tl.load(g + i) / tl.load(area + i)
    if weight is not None:
        factor *= tl.load(weight + i).to(tl.float32)
    slope = tl.load(out + i * size + e, mask=e < size, other=0.0).to(tl.float32) - tl.load(
        target + i * size + e, mask=e < size, other=0.0
    ).to(tl.float32)
    slope *= factor
    if mask is not None:
        slope *= tl.load(mask + i * plane + e % plane, mask=e < size, other=0.0).to(tl.float32)
    tl.store(d_out + i * size + e, round_to(slope, d_out.dtype.element_ty), mask=e < size)
    if d_target is not None:
        tl.store(
            d_target + i * size + e, round_to(-slope, d_target.dtype.element_ty), mask=e < size
        )


def mse_refusal(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> str | None:
    """Why the kernels do not run on these arguments, or None."""
    said = device_refusal(out)
    if said is not None:
        return said
    given = [x for x in (mask, weight) if x is not None]
    if any(x.dtype not in TYPES for x in (out, target, *given)):
        return f"the output is {out.dtype} and the target {target.dtype}; there is a kernel for fp32, bf16 and fp16"
    if any(x.requires_grad for x in given):
        return "the mask or the weight wants a gradient"
    if (
        out.shape != target.shape
        or not out.numel()
        or (mask is not None and mask.shape != (len(out), 1, *out.shape[2:]))
    ):
        return f"the shapes {list(out.shape)} and {list(target.shape)} are not an output and its target with a mask of one channel"
    return None


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """reference.snr_weighted_mse in one launch, and one in the backward; arguments that are not contiguous are copied first."""
    mask, weight = (None if x is None else x.contiguous() for x in (mask, weight))
    return _mse(out.contiguous(), target.contiguous(), mask, weight)[0]


@torch.library.custom_op("lora_core::snr_weighted_mse", mutates_args=())
def _mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, area = _rows(out)
    size, plane = out[0].numel(), out[0, 0].numel()
    forward_kernel[(len(out),)](
        out,
        target,
        mask,
        weight,
        rows,
        area,
        size,
        plane,
        TINY,
        ROW,
        num_warps=_warps(out.dtype == torch.float32),
    )
    return rows, area


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
    """(d_out, d_target), the second empty unless both are asked for."""
    d_out, d_target = _slopes(out, target, both)
    size, plane = out[0].numel(), out[0, 0].numel()
    grid, second = (triton.cdiv(size, BLOCK), len(out)), d_target if both else None
    backward_kernel[grid](
        g, out, target, mask, weight, area, d_out, second, size, plane, BLOCK, num_warps=4
    )
    return d_out, d_target


def _rows(out: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(len(out), dtype=torch.float32), out.new_empty(
        len(out), dtype=torch.float32
    )


def _slopes(out: Tensor, target: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(target) if both else target.new_empty(0)


@_mse.register_fake
def _(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rows(out)


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
    return _slopes(out, target, both)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    both = ctx.needs_input_grad[1]
    d_out, d_target = _mse_back(g.contiguous(), *ctx.saved_tensors, both)
    return d_out, d_target if both else None, None, None


_mse.register_autograd(_backward, setup_context=_keep)


def _cost(out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None) -> Cost:
    return Cost(1, out.nbytes + target.nbytes + (0 if mask is None else mask.nbytes) + 8 * len(out))


def _cost_back(
    g: Tensor,
    out: Tensor,
    target: Tensor,
    mask: Tensor | None,
    weight: Any,
    area: Tensor,
    both: bool,
) -> Cost:
    return Cost(
        1,
        2 * out.nbytes
        + target.nbytes * (2 if both else 1)
        + (0 if mask is None else mask.nbytes)
        + 8 * len(out),
    )


COSTS["lora_core::snr_weighted_mse"] = _cost
COSTS["lora_core::snr_weighted_mse_backward"] = _cost_back


def _warps(is_fp32: bool) -> int:
    """Of the forward kernel: the number with which ptxas spills nothing on sm_80 to sm_100."""
    return 4 if is_fp32 else 8


def list_builds(full: bool) -> list[Build]:
    """Both kernels with and without a mask; every dtype of the output in `full`."""
    found = []
    for dtype in ("bf16", "fp32", "fp16") if full else ("bf16",):
        for kernel in (forward_kernel, backward_kernel):
            for mask in (True, False):
                constants: dict[str, Any] = (
                    {"BLOCK": ROW, "TINY": TINY} if kernel is forward_kernel else {"BLOCK": BLOCK}
                )
                constants |= {} if mask else {"mask": None, "weight": None, "d_target": None}
                types = {"out": f"*{dtype}", "d_out": f"*{dtype}", "size": "i32", "plane": "i32"}
                constants = {
                    name: value for name, value in constants.items() if name in kernel.arg_names
                }
                signature = {
                    name: "constexpr" if name in constants else types.get(name, "*fp32")
                    for name in kernel.arg_names
                }
                name = f"snr_weighted_mse {kernel.__name__} {dtype}{' masked' if mask else ''}"
                warps = _warps(dtype == "fp32") if kernel is forward_kernel else 4
                found.append(
                    Build(kernel, signature, constants, warps, 3, False, name, ("size", "plane"))
                )
    return found
