"""Skip-layer guidance: away from what a model predicts without some of its blocks.

With guidance g the velocity is uncond + g (cond - uncond) + scale (cond - without), in a range of
the steps. Source: Stability AI's code for Stable Diffusion 3.5 medium, and diffusers' pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_core.diffusion.noise import NoiseLevel
from lora_core.errors import UserError

ROUNDING = 1e-6  # of a sigma, so that a range includes its ends


@dataclass(frozen=True)
class SkipLayers:
    """What a family with such guidance does in its denoiser; with the defaults nothing.

    The family adds weight (cond - without) to the rows of prompts, with weight = scale / g: after
    guidance with g that is scale (cond - without).
    """

    blocks: tuple[int, ...] = ()
    weight: float = 0.0
    sigmas: tuple[float, float] = (0.0, 0.0)  # the lowest and the highest at which it acts

    def act_at(self, level: NoiseLevel) -> bool:
        """Whether there is such guidance at a level, that of all rows; waits for the device."""
        low, high = self.sigmas
        return bool(self.blocks) and low <= level.sigma[0].item() <= high


def choose_skip_layers(family: Any, config: Any) -> SkipLayers | None:
    """The guidance of infer.py's options --skip-layers ...; None for a family without it.

    As in diffusers' pipeline, steps i of n have it for which start n < i < stop n. Raises UserError
    where it has no effect: for another family, without other guidance, with scale 0, and where no
    step is in the range; and for blocks that the model does not have.
    """
    if not hasattr(family, "set_skip_layers"):
        if config.skip_layers:
            raise UserError(
                f"--skip-layers has no effect on this model ({family.name}), which has no joint "
                "blocks to skip; leave it out"
            )
        return None
    if not config.skip_layers:
        return SkipLayers()
    count = len(family.transformer.transformer_blocks)
    for block in config.skip_layers:
        if not 0 <= block < count:
            raise UserError(
                f"--skip-layers has {block}; the blocks of this model are 0 to {count - 1}"
            )
    if config.guidance in (0, 1):
        raise UserError(
            f"--skip-layers cannot act at guidance {config.guidance:g}, where one prompt alone is "
            "asked for; leave it out or raise --guidance"
        )
    if config.skip_layer_scale == 0:
        raise UserError("--skip-layers has no effect with --skip-layer-scale 0; leave both out")
    height = (config.height or family.resolution) // family.factor
    width = (config.width or family.resolution) // family.factor
    sigmas = family.schedule_at(height, width).step_sigmas(config.steps)
    first = config.skip_layer_start * len(sigmas)
    last = config.skip_layer_stop * len(sigmas)
    left_out = len(sigmas) - int(config.strength * len(sigmas))  # of image to image
    acting = [sigma for i, sigma in enumerate(sigmas) if first < i < last and i >= left_out]
    if not acting:
        raise UserError(
            f"none of {len(sigmas)} steps{_describe_start(left_out)} is between "
            f"--skip-layer-start {config.skip_layer_start:g} and --skip-layer-stop "
            f"{config.skip_layer_stop:g} of them; widen the range or take more steps"
        )
    weight = config.skip_layer_scale / config.guidance
    return SkipLayers(config.skip_layers, weight, (acting[-1] - ROUNDING, acting[0] + ROUNDING))


def _describe_start(left_out: int) -> str:
    return f", of which --strength leaves out {left_out}," if left_out else ""
