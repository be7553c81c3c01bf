"""Regions of an image with prompts of their own (Mix-of-Show, arXiv 2305.18292 section 3.4).

In each cross-attention layer the prompt acts on the whole image; inside a region's box the layer's
output is replaced by that of the region's own prompt, and averaged where boxes overlap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_core.cross_attention import Box
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.settings import SamplerSettings

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
REGION = re.compile(rf"{NUMBER},{NUMBER},{NUMBER},{NUMBER}:(.*)", re.DOTALL)
NEGATIVE = re.compile(r";\s*negative:")  # before a region's negative prompt
EXAMPLE = '--region "0,0,256,512: a photo of TOK"'


class PromptRegion(NamedTuple):
    """A box and its prompts, with placeholder words."""

    box: Box
    prompt: str
    negative: str  # "": that of the whole image


def parse_region(text: str, width: int, height: int) -> PromptRegion:
    """Parses "x0,y0,x1,y1: prompt" or "x0,y0,x1,y1: prompt; negative: prompt".

    The numbers are pixels of an image of width x height: left, top, right, bottom; nothing is
    evaluated. Raises UserError for another form, a box outside the image or empty, no prompt, and
    an empty negative prompt.
    """
    found = REGION.fullmatch(text)
    if found is None:
        raise UserError(
            f"--region {text!r} is not x0,y0,x1,y1: prompt, with the box in pixels; "
            f"write for instance {EXAMPLE}"
        )
    left, top, right, bottom = (float(number) for number in found.groups()[:4])
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            f"the box {left:g},{top:g},{right:g},{bottom:g} of --region {text!r} is not inside the "
            f"image, {width} x {height} pixels; write left,top,right,bottom with left < right and "
            "top < bottom"
        )
    prompt, *negative = (part.strip() for part in NEGATIVE.split(found[5], maxsplit=1))
    if not prompt:
        raise UserError(f"--region {text!r} has no prompt after its box; write {EXAMPLE}")
    if negative == [""]:
        raise UserError(
            f"--region {text!r} has no text after negative: and would have that of the whole image "
            "(--negative); write one or leave the negative prompt out"
        )
    box = Box(left / width, top / height, right / width, bottom / height)
    return PromptRegion(box, prompt, "".join(negative))


def check_regions(
    family: Family, regions: Sequence[PromptRegion], settings: SamplerSettings
) -> None:
    """Raises UserError for regions that cannot act on this model, or negatives without effect."""
    if regions and not family.layout.cross_attention:
        raise UserError(
            f"regions need layers of cross-attention, which the model ({family.name}) has not: "
            "its image and text attend to each other as one sequence; leave --region out"
        )
    if settings.guidance == 1 and any(region.negative for region in regions):
        raise UserError(
            "the negative prompt of a region has no effect at guidance 1; leave it out or raise "
            "--guidance"
        )
