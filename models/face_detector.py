"""OWL-ViT: boxes around what some words name, such as faces (arXiv 2205.06230).

transformers has no detector that knows faces alone; this one finds what it is told to find.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPTokenizer, OwlViTForObjectDetection

from lora_core.errors import UserError
from models.components import config_errors
from models.image_reader import ImageReader

FACE_WORDS = "a photo of a face"
SURE = 0.1  # smallest score of a box, the default of the library's own example
OUTSIDE, INSIDE = 1, 255  # greys of lora_ppim's face masks
PROMPT_TOKENS = 16  # that OWL-ViT reads


class FaceDetector(ImageReader):
    """OWL-ViT: boxes around what the words name."""

    parts: ClassVar = {"owlvit": (OwlViTForObjectDetection, CLIPTokenizer)}
    wanted = "an OWL-ViT model, such as google/owlvit-base-patch32"

    def find(self, image: Image.Image, words: str = FACE_WORDS) -> Image.Image | None:
        """The mask of an RGB image, mode L: white boxes on black; None where nothing is found."""
        boxes = self.find_boxes(image, words)
        if not len(boxes):
            return None
        mask = Image.new("L", image.size, OUTSIDE)
        for box in boxes.tolist():
            ImageDraw.Draw(mask).rectangle(_inner_pixels(box, image.size), fill=INSIDE)
        return mask

    @torch.no_grad()
    def find_boxes(self, image: Image.Image, words: str) -> Tensor:
        """[n, 4] left, top, right, bottom in pixels, of all boxes that the network is sure of.

        Raises UserError for weights that give NaN.
        """
        pixels = self.squeeze(image).to(self.device)
        with config_errors(self.path):
            found = self.network(pixel_values=pixels, **self.tokenize([words], PROMPT_TOKENS))
        if not (found.logits.isfinite().all() and found.pred_boxes.isfinite().all()):
            raise UserError(
                f"the detector {self.path} gives NaN or infinity: its weights are damaged; "
                "fetch it again"
            )
        scores = found.logits[0].max(dim=-1).values.sigmoid()
        center, size = found.pred_boxes[0][scores > SURE].cpu().split(2, dim=-1)
        corners = torch.cat([center - size / 2, center + size / 2], dim=-1)
        return corners * torch.tensor([*image.size, *image.size])


def _inner_pixels(box: list[float], size: tuple[int, int]) -> list[int]:
    """The first and last pixel of a box, inside the image."""
    left, top, right, bottom = map(round, box)
    width, height = size
    left, top = max(0, min(left, width - 1)), max(0, min(top, height - 1))
    return [left, top, max(left, min(right, width) - 1), max(top, min(bottom, height) - 1)]
