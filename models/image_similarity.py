"""CLIP's embeddings of images and texts, whose cosines measure likeness (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from lora_core.data.images import image_to_tensor
from lora_core.errors import UserError
from lora_core.text import shorten_value
from models.components import load_network, load_part, read_json, read_prompt_length
from models.families import choose_device
from models.segmenter import read_preparation

BATCH = 16


class ImageSimilarity:
    """A CLIP model from a folder or the hub, as transformers writes it.

    Images are scaled to the model's side with the bicubic filter, cropped in the middle and
    normalized, as CLIP's own processor does. Raises UserError for what is no CLIP model.
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        found = read_json(path, "config.json").get("model_type")
        if found != "clip":
            raise UserError(
                f"the model {path} is of the type {shorten_value(found)}, expected clip; give the "
                "folder or hub id of a CLIP model with both encoders"
            )
        self.device = choose_device(device)
        self.network = load_network(CLIPModel, path, "", torch.float32, self.device)
        self.network.requires_grad_(False).eval()
        self.tokenizer = load_part(CLIPTokenizer.from_pretrained, path, "")
        self.side, self.mean, self.std = read_preparation(path)

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
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=read_prompt_length(self.tokenizer),
            truncation=True,
            return_tensors="pt",
        )
        features = self.network.get_text_features(
            input_ids=ids.input_ids.to(self.device),
            attention_mask=ids.attention_mask.to(self.device),
        )
        return F.normalize(features.pooler_output.cpu().double(), dim=1)

    def _prepare(self, image: Image.Image) -> Tensor:
        """[3, side, side] normalized pixels of an image."""
        width, height = image.size
        scale = self.side / min(width, height)
        size = max(self.side, round(width * scale)), max(self.side, round(height * scale))
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        whole = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        middle = whole.crop((left, top, left + self.side, top + self.side))
        return (image_to_tensor(middle) / 255 - self.mean) / self.std
