"""DoRA's row norms by the factored form, in torch, and their gradients.

Two ways to ||W_j + s B_j A||, both in fp32, and neither ever writes B A:
    factored  n^2 = ||W||^2 + 2 s <U, B> + s^2 <B G, B>, U = W A^T, G = A A^T: no weight-sized matrix, but the terms cancel
    tiled     the sum of squares of W + s B A, formed tile by tile in registers: reads W once and cancels nothing
Largest relative error of a row by ||W + s B A|| / ||W||, 64 x 1280 at rank 16, fp32 W (`cancelling` of tests/test_triton_dora.py, one x86 thread):
    residual            1.4     0.1     0.01    0.001
    factored            1.4e-7  1.9e-5  1.6e-3  1.8e-1
    with the fall-back  1.4e-7  1.4e-7  4.8e-7  4.6e-6
    tiled               8.4e-8  1.0e-7  5.7e-7  5.4e-6
    dense               1.2e-7  1.4e-7  4.8e-7  4.6e-6
So the CPU takes the factored form and recomputes densely the rows whose n^2 came out under 0.05 ||W||^2. A GPU takes the tiled one: there the
published factored norm is slower than the dense one (arXiv 2603.22276's own files: 0.256 against 0.096 ms at 4096 x 4096 on an H200).
||W||^2 is not cached: a frozen weight can still be moved, cast or folded into in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import COSTS, Cost, reference
from lora_core.kernels.reference import wide, without_autocast

BLOCK = 400_000  # elements of W that are fp32 at once on the CPU: 320 of 1280 columns, 1.6 MB, took 1.07 ms of 1280 x 1280; 32 rows 1.8, all rows 4.1
CANCELLED = 0.05  # of ||W||^2, below which the factored form has lost more than a digit to the tiled one

Layer = tuple[Tensor, Tensor, Tensor, float]  # weight, down, up, scale


def dora_norm_factored(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """reference.dora_norm by the factored form on the CPU, differentiable in down and up; the reference itself elsewhere, for groups and for a weight
    that wants a gradient."""
    if weight.device.type != "cpu" or groups_of(down, up) != 1 or weight.requires_grad or not weight.is_floating_point() or not len(weight):
        return reference.dora_norm(weight, down, up, scale)
    return _factored(weight, down, up, float(scale))


def dora_norms_factored(layers: tuple[Layer, ...]) -> tuple[Tensor, ...]:
    """dora_norm_factored of every layer."""
    return tuple(dora_norm_factored(*layer) for layer in layers)


@torch.library.custom_op("lora_core::dora_norm_factored", mutates_args=())
def _factored(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    dtype = wide(weight.dtype)
    with without_autocast(weight):
        w, a, b = weight.flatten(1), down.flatten(1).to(dtype), up.flatten(1).to(dtype)
        (rows, columns), at = w.shape, a.t()
        step = _block(rows, columns)
        wide_rows, squares, u = w.new_empty(step, columns, dtype=dtype), w.new_empty(rows, dtype=dtype), w.new_empty(b.shape, dtype=dtype)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = wide_rows[: stop - start].copy_(w[start:stop])
            torch.mm(block, at, out=u[start:stop])
            torch.linalg.vector_norm(block, dim=1, out=squares[start:stop])
        squares.square_()
        norms = torch.addmm(u, b, a @ at, beta=2 * scale, alpha=scale * scale).mul_(b).sum(1).add_(squares)
        lost = torch.nonzero(norms < CANCELLED * squares).flatten()
        norms.clamp_(min=0).sqrt_()
        if len(lost):
            norms[lost] = torch.linalg.vector_norm(torch.addmm(w[lost].to(dtype), b[lost], a, alpha=scale), dim=1)
        return norms


@_factored.register_fake
def _(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return weight.new_empty(len(weight), dtype=wide(weight.dtype))


def _block(rows: int, columns: int) -> int:
    return max(1, min(rows, BLOCK // max(1, columns)))


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, down, up, ctx.scale = inputs
    ctx.save_for_backward(weight, down, up, output)


def _norm_backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor, None]:
    weight, down, up, norm = ctx.saved_tensors
    d_down, d_up = norm_gradients(weight, down, up, ctx.scale, norm, g)
    return None, d_down, d_up, None


def norm_gradients(weight: Tensor, down: Tensor, up: Tensor, scale: float, norm: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of down and up for the gradient g [out] of the norms: with V = W + s B A and c = s g / n, dB = c V A^T and dA = (c B)^T V.

    V is formed: a base in half precision needs the fp32 copy anyway, and V's products from W's and G's cancel as the norm's terms do. A row of norm 0
    gets no gradient, as in torch.
    """
    dtype = wide(weight.dtype)
    with without_autocast(weight):
        w, a, b = weight.flatten(1).to(dtype), down.flatten(1).to(dtype), up.flatten(1).to(dtype)
        v = torch.addmm(w, b, a, alpha=scale)
        c = torch.where(norm > 0, scale * g / norm, 0).to(dtype)[:, None]
        d_up, d_down = c * (v @ a.t()), (c * b).t() @ v
    return d_down.view(down.shape).to(down.dtype), d_up.view(up.shape).to(up.dtype)


_factored.register_autograd(_norm_backward, setup_context=_keep_norm)


def _factored_cost(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Cost:
    """Three calls a block and seven at the end, without the rows that are recomputed."""
    rows, columns = len(weight), weight[0].numel()
    blocks = -(-rows // _block(rows, columns))
    return Cost(3 * blocks + 7, weight.nbytes + 3 * 4 * weight.numel() + down.nbytes + 4 * up.nbytes, True)


COSTS["lora_core::dora_norm_factored"] = _factored_cost


def groups_of(down: Tensor, up: Tensor) -> int:
    return down.shape[0] // max(1, up.shape[1])
