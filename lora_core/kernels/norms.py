"""DoRA's row norms in torch, a block of rows at a time, and their gradients.

Three ways to ||W_j + s B_j A|| in fp32:
    dense     the reference: two matrices of W's size
    tiled     the same sum of squares tile by tile: W is read once, nothing of its size is written.
              Here by blocks of rows that stay in the cache (CPU), in dora.py by tiles that stay in
              registers (Triton)
    factored  n^2 = ||W||^2 + 2 s <U, B> + s^2 <B G, B>, U = W A^T, G = A A^T (arXiv 2603.22276, and
              peft's pull request 3387): its terms cancel

Largest relative error of a row by ||W + s B A|| / ||W||, 64 x 1280 at rank 16, fp32 W
(`cancelling` of tests/test_norms.py):
    residual                                         1.4     0.1     0.01    0.001
    dense                                            1.2e-7  1.4e-7  4.8e-7  4.6e-6
    tiled, Triton                                    8.4e-8  1.0e-7  5.7e-7  5.4e-6
    factored                                         1.4e-7  1.9e-5  1.6e-3  1.8e-1
    factored, rows under n^2 = 0.05 ||W||^2 dense    1.4e-7  1.4e-7  4.8e-7  4.6e-6

Milliseconds for a bf16 W, fp32 factors, one x86 thread of a busy machine, medians of 15 taken in
turns:
    rows, columns, rank    dense     factored with dense rows    tiled
      320,  320,  16         0.26              0.49               0.10
      640,  640,  16         2.04              1.13               0.56
     1280, 1280,  16        14.87              2.55               1.26
      640, 2048,  16         2.23              1.66               0.91
    10240, 1280,  16       112.90              9.93               7.71
     3072, 3072, 128       106.05             35.46              32.49

So the tiled form, exact and without a branch on the values, is used everywhere. Both cast W by
blocks; U is as expensive as B A. On GPUs the factored form was slower in its own publication (0.256
against the dense form's 0.096 ms at 4096 x 4096 on an H200, from that paper's files). ||W||^2 is
never cached: a frozen weight can still be moved, cast or folded into in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import reference
from lora_core.kernels.costs import COSTS, Cost
from lora_core.kernels.reference import wide_dtype, without_autocast

# Elements of W that are fp32 at once, 1.6 MB; 1280 x 1280 takes 1.84 ms with 50,000, 1.53 with
# 100,000, 1.21 with 200,000.
BLOCK = 400_000

NormLayer = tuple[Tensor, Tensor, Tensor, float]  # weight, down, up, scale


def dora_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """reference.dora_norm by blocks of rows on the CPU, differentiable in down and up.

    The reference itself elsewhere, for groups and for a weight that requires a gradient.
    """
    grouped = count_groups(down, up) != 1
    if weight.device.type != "cpu" or grouped or weight.requires_grad or not weight.numel():
        return reference.dora_norm(weight, down, up, scale)
    wants_gradient = (down.requires_grad or up.requires_grad) and torch.is_grad_enabled()
    if wants_gradient or torch.compiler.is_compiling():
        return _tiled(weight, down, up, float(scale))
    return _norms_by_blocks(weight, down, up, scale)  # without the registered op's 60 us


def dora_norms(layers: tuple[NormLayer, ...]) -> tuple[Tensor, ...]:
    """dora_norm of every layer."""
    return tuple(dora_norm(*layer) for layer in layers)


@torch.library.custom_op("lora_core::dora_norm_blocks", mutates_args=())
def _tiled(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return _norms_by_blocks(weight, down, up, scale)


def _norms_by_blocks(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    dtype = wide_dtype(weight.dtype)
    if torch.is_autocast_enabled("cpu"):
        with without_autocast(weight):
            return _norms_by_blocks(weight, down, up, scale)
    w, a, b = weight.flatten(1), down.flatten(1).to(dtype), up.flatten(1).to(dtype)
    rows, columns = w.shape
    step = _block(rows, columns)
    if step == rows:
        return torch.linalg.vector_norm(torch.addmm(w.to(dtype), b, a, alpha=scale), dim=1)
    tile, norms = w.new_empty(step, columns, dtype=dtype), w.new_empty(rows, dtype=dtype)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = tile[: stop - start].copy_(w[start:stop]).addmm_(b[start:stop], a, alpha=scale)
        torch.linalg.vector_norm(block, dim=1, out=norms[start:stop])
    return norms


@_tiled.register_fake
def _(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return weight.new_empty(len(weight), dtype=wide_dtype(weight.dtype))


def _block(rows: int, columns: int) -> int:
    return max(1, min(rows, BLOCK // max(1, columns)))


def norm_gradients(
    weight: Tensor, down: Tensor, up: Tensor, scale: float, norm: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of down and up for the gradient g [out] of the norms.

    With V = W + s B A and c = s g / n they are dB = c V A^T and dA = (c B)^T V. V is formed: a base
    in half precision needs the fp32 copy anyway, and computing V's products from W's and G's would
    cancel as the factored norm does. A row of norm 0 gets no gradient, as in torch.
    """
    dtype = wide_dtype(weight.dtype)
    with without_autocast(weight):
        w, a, b = weight.flatten(1).to(dtype), down.flatten(1).to(dtype), up.flatten(1).to(dtype)
        v = torch.addmm(w, b, a, alpha=scale)
        c = torch.where(norm > 0, scale * g / norm, 0).to(dtype)[:, None]
        d_up = c * (v @ a.t())
        d_down = (c * b).t() @ v
    return d_down.view(down.shape).to(down.dtype), d_up.view(up.shape).to(up.dtype)


def save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save tensors for `norm_backward`; both work for any op (weight, down, up, scale) -> norm."""
    weight, down, up, ctx.scale = inputs
    ctx.save_for_backward(weight, down, up, output)


def norm_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    """Gradients of (weight, down, up, scale); the weight gets none."""
    weight, down, up, norm = ctx.saved_tensors
    return None, *norm_gradients(weight, down, up, ctx.scale, norm, g), None


_tiled.register_autograd(norm_backward, setup_context=save_norm)


def _cost(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Cost:
    """The cost of dora_norm: three calls a block, whose fp32 elements are written and read twice.

    A single block is written and read once, and its weight is copied only to cast it.
    """
    blocks = -(-len(weight) // _block(len(weight), weight[0].numel()))
    if blocks == 1:
        passes = 1 + (weight.dtype != wide_dtype(weight.dtype))
        moved = weight.nbytes + 2 * 4 * passes * weight.numel() + down.nbytes + up.nbytes
        return Cost(1 + passes, moved, True)
    moved = weight.nbytes + 4 * 4 * weight.numel() + down.nbytes * blocks + up.nbytes
    return Cost(3 * blocks, moved, True)


COSTS["lora_core::dora_norm_blocks"] = _cost


def count_groups(down: Tensor, up: Tensor) -> int:
    """The number of a convolution's groups, from its factors."""
    return down.shape[0] // max(1, up.shape[1])
