"""CLIPSeg: masks of the part of an image that some words name (arXiv 2112.10003)."""

from __future__ import annotations

from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from lora_core.errors import UserError
from models.components import read_prompt_length
from models.image_reader import ImageReader

BIAS = 0.01  # of lora_ppim, so that no part of an image is left out wholly


class ClipSegmenter(ImageReader):
    """CLIPSeg: what `find` draws is the likelihood that a pixel is of what the words name."""

    parts: ClassVar = {"clipseg": (CLIPSegForImageSegmentation, CLIPTokenizer)}
    wanted = "a CLIPSeg model"

    @torch.no_grad()
    def find(self, image: Image.Image, words: str, temperature: float = 1.0) -> Image.Image | None:
        """The mask of an RGB image, in mode L and of its size; None where the words fit nothing.

        They fit nothing where the mask is nowhere twice as bright as at its darkest pixel. A
        `temperature` above 1 makes masks softer. Raises UserError for weights that give NaN.
        """
        pixels = self.squeeze(image, Image.Resampling.BILINEAR).to(self.device)
        read = self.tokenize([words, ""], read_prompt_length(self.tokenizer))
        logits = self.network(pixel_values=pixels.expand(2, -1, -1, -1), **read).logits
        if not logits.isfinite().all():
            raise UserError(
                f"the segmenter {self.path} gives NaN or infinity: its weights are damaged; "
                "fetch it again"
            )
        levels = mask_levels(logits.float().cpu(), temperature)
        darkest, brightest = levels.min().item(), levels.max().item()
        if 2 * darkest >= brightest:
            return None
        small = Image.frombytes("L", (self.side, self.side), levels.numpy().tobytes())
        return small.resize(image.size, Image.Resampling.BICUBIC)


def mask_levels(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[h, w] uint8 greys of a mask, from the logits [2, h, w] of the words and the empty prompt.

    p = softmax over the two of logits / temperature, plus 0.01, at most 1, as 255 p / max p
    (cloneofsimo's lora_ppim, whose --temp is 1).
    """
    chances = ((logits / temperature).softmax(0)[0] + BIAS).clamp(0, 1)
    return (255 * chances / chances.max()).to(torch.uint8)
