"""The masked, weighted squared error in torch with the fewest passes over memory.

The difference is saved for the backward, which is one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import reference


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """reference.snr_weighted_mse in three passes over the output (four with a mask), and one in the
    backward.
    """
    mask_learns = mask is not None and mask.requires_grad
    if mask_learns or (weight is not None and weight.requires_grad):
        return reference.snr_weighted_mse(out, target, mask, weight)
    return SquaredError.apply(out, target, mask, weight)


class SquaredError(torch.autograd.Function):
    """(out, target, mask, weight) -> losses  [b]"""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        dtype = reference.wide_dtype(out.dtype)
        difference = out.to(dtype) - target.to(dtype)
        if mask is None:
            losses = (difference * difference).flatten(1).mean(1)
            factor = torch.full_like(losses, 2 / max(1, out[0].numel()))
        else:
            area = reference.masked_area(difference, mask)
            losses = (mask * (difference * difference)).sum((1, 2, 3)) / area
            factor = 2 / area
        ctx.save_for_backward(difference, mask, factor if weight is None else factor * weight)
        ctx.dtypes = out.dtype, target.dtype
        return losses if weight is None else losses * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        difference, mask, factor = ctx.saved_tensors
        factor = (g * factor).view(-1, *[1] * (difference.ndim - 1))
        slope = difference * (factor if mask is None else factor * mask)
        wants_out, wants_target, *_ = ctx.needs_input_grad
        d_out = slope.to(ctx.dtypes[0]) if wants_out else None
        d_target = (-slope).to(ctx.dtypes[1]) if wants_target else None
        return d_out, d_target, None, None
