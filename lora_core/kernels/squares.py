"""The masked, weighed squared error in torch with the fewest passes: the difference is kept, and its gradient is one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import reference


def snr_weighted_mse(
    out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
) -> Tensor:
    """reference.snr_weighted_mse; three passes over the output (four with a mask), and one in the backward."""
    if any(x is not None and x.requires_grad for x in (mask, weight)):
        return reference.snr_weighted_mse(out, target, mask, weight)
    return _Mse.apply(out, target, mask, weight)


class _Mse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, target: Tensor, mask: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        dtype = reference.wide_dtype(out.dtype)
        difference = out.to(dtype) - target.to(dtype)
        if mask is None:
            rows = (difference * difference).flatten(1).mean(1)
            factor = torch.full_like(rows, 2 / max(1, out[0].numel()))
        else:
            area = reference.masked_area(difference, mask)
            rows, factor = (mask * (difference * difference)).sum((1, 2, 3)) / area, 2 / area
        ctx.save_for_backward(difference, mask, factor if weight is None else factor * weight)
        ctx.dtypes = out.dtype, target.dtype
        return rows if weight is None else rows * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        difference, mask, factor = ctx.saved_tensors
        factor = (g * factor).view(-1, *[1] * (difference.ndim - 1))
        slope = difference * (factor if mask is None else factor * mask)
        of_out, of_target = ctx.needs_input_grad[:2]
        return (
            slope.to(ctx.dtypes[0]) if of_out else None,
            (-slope).to(ctx.dtypes[1]) if of_target else None,
            None,
            None,
        )
