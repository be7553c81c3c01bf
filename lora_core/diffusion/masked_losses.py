"""Masks in the loss: scales of the masked loss by the names of their sources, and preservation of
the base model's output outside the mask.

All scales here are one law. A masked loss is f sum(w e) / (c sum(w)), where e [b, c, h, w] is the
error, w [b, 1, h, w] are weights made of the mask, and f [b] is a factor. Losses divide by c sum(w)
themselves (`masked_mean`, and the fused kernel of mse), so a scale is two functions:

    mean           w = m^T                               f = 1
    mixofshow      w = m^T                               f = c: sum(m e) / sum(m)
    unnormalized   w = m^T                               f = mean(w): mean(m e)
    cloneofsimo    w = (((m + 0.01) / (max + 0.01))^T)^2   f = mean(w): mean(w e)

m is the image's mask, T the stage's mask temperature, c the number of latent channels (4 in SD).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.diffusion.losses import StepOutput, copy_declarations
from lora_core.kernels import call

Loss = Callable[[StepOutput], Tensor]  # -> [b]


class MaskScale(NamedTuple):
    """A way to weight an image's loss by its mask."""

    weights: Callable[[Tensor, float], Tensor]  # (mask [b, 1, h, w], temperature) -> weights
    factor: Callable[[Tensor, int], Tensor]  # (weights, latent channels) -> [b]


def sharpen_mask(mask: Tensor, temperature: float) -> Tensor:
    """The mask [b, 1, h, w] to the power of the temperature, the mask itself for 1.

    Where a mask would underflow to zero in this dtype, it is divided by its maximum first, which
    leaves a loss that divides by the mask's sum unchanged.
    """
    raised = mask**temperature
    if temperature == 1:
        return mask
    brightest = mask.amax((1, 2, 3), keepdim=True)
    return torch.where(brightest**temperature < 1e-30, (mask / brightest) ** temperature, raised)


def raise_mask(mask: Tensor, temperature: float) -> Tensor:
    """The mask [b, 1, h, w] to the power of the temperature, the mask itself for 1."""
    return mask if temperature == 1 else mask**temperature


def lift_mask(mask: Tensor, temperature: float) -> Tensor:
    """Squared weights of cloneofsimo's lora_pti: 0.01 is added to the mask, the sum raised to the
    power of the temperature and divided by its maximum.

    The maximum is that of the whole micro-batch, as there, so an image's loss depends on the masks
    beside it. The source multiplies output and target by the weights, which squares them.
    """
    lifted = mask + 0.01
    return (lifted / lifted.amax()) ** (2 * temperature)


def _mean_weight(weights: Tensor, _channels: int) -> Tensor:
    return weights.mean((1, 2, 3))


MASK_SCALES: dict[str, MaskScale] = {
    # an image with a small mask counts as much as one with a large mask
    "mean": MaskScale(sharpen_mask, lambda weights, _: weights.new_ones(len(weights))),
    "mixofshow": MaskScale(
        sharpen_mask, lambda weights, channels: weights.new_full((len(weights),), channels)
    ),
    "cloneofsimo": MaskScale(lift_mask, _mean_weight),
    # kohya's --masked_loss
    "unnormalized": MaskScale(raise_mask, _mean_weight),
}


MASK_FORMULAS = {  # key of MASK_SCALES -> the loss of a mask m and an error e
    "mean": "sum(m e) / (c sum(m))",
    "mixofshow": "sum(m e) / sum(m)",
    "cloneofsimo": "mean(w e) with w = (m + 0.01)^2 / max",
    "unnormalized": "mean(m e)",
}


def describe_mask(scale: str, outside: float) -> str:
    """How a mask acts in the loss, for the line that a run prints about its loss."""
    words = f", masked: {MASK_FORMULAS[scale]}"
    if outside:
        words += f", plus {outside:g} times the change from the base model outside the mask"
    return words


def scale_masked_loss(loss: Loss, scale: str) -> Loss:
    """The loss times the factor of a scale, one of MASK_SCALES.

    `step.mask` holds the scale's weights already. The loss divides by their sum, as all entries of
    LOSSES do and others with `masked_mean`. "mean" returns the loss itself.
    """
    if scale == "mean":
        return loss
    factor = MASK_SCALES[scale].factor

    def scaled_loss(step: StepOutput) -> Tensor:
        rows = loss(step)
        if step.mask is None:
            return rows
        return rows * factor(step.mask, step.out.shape[1]).to(rows)

    return copy_declarations(scaled_loss, loss)


def add_outside_preservation(loss: Loss, weight: float) -> Loss:
    """The loss plus `weight` times the squared difference from the base model outside the mask.

    The difference is the mean of (out - base)^2 weighted by 1 - m for the masks m as drawn,
    whatever their scale; `base` is `step.plain_base_out`. It is 0 for an image without a black part
    in its mask, such as a class image. Costs one more forward pass without gradient.
    """

    def preserving_loss(step: StepOutput) -> Tensor:
        rows = loss(step)
        if step.drawn_mask is None:
            return rows
        outside = 1 - step.drawn_mask
        change = call("snr_weighted_mse", step.out, step.plain_base_out, outside, None)
        return rows + weight * change

    return copy_declarations(preserving_loss, loss)
