"""CLIP's embeddings of images and texts, whose cosines measure likeness (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from models.components import read_prompt_length
from models.families import choose_device
from models.image_reader import ImageReader

BATCH = 16


class ImageSimilarity(ImageReader):
    """A CLIP model from a folder or the hub, as transformers writes it.

    Images are scaled to the model's side with the bicubic filter, cropped in the middle and
    normalized, as CLIP's own processor does.
    """

    parts: ClassVar = {"clip": (CLIPModel, CLIPTokenizer)}
    wanted = "a CLIP model with both encoders"

    def __init__(self, path: str, device: str = "auto") -> None:
        super().__init__(path, choose_device(device))

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """[n, d] unit vectors on the CPU, float64."""
        found = []
        for first in range(0, len(images), BATCH):
            pixels = torch.stack([self._prepare(image) for image in images[first : first + BATCH]])
            features = self.network.get_image_features(pixel_values=pixels.to(self.device))
            found.append(features.pooler_output)
        return F.normalize(torch.cat(found).cpu().double(), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[n, d] unit vectors on the CPU, float64; what is beyond the longest text is cut off."""
        read = self.tokenize(list(texts), read_prompt_length(self.tokenizer))
        features = self.network.get_text_features(**read)
        return F.normalize(features.pooler_output.cpu().double(), dim=1)

    def _prepare(self, image: Image.Image) -> Tensor:
        """[3, side, side] normalized pixels of an image."""
        width, height = image.size
        scale = self.side / min(width, height)
        size = max(self.side, round(width * scale)), max(self.side, round(height * scale))
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        whole = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        middle = whole.crop((left, top, left + self.side, top + self.side))
        return self.normalize(middle)
