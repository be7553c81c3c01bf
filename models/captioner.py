"""BLIP and Florence-2: captions of images (arXiv 2201.12086, 2311.06242)."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
)

from lora_core.data.images import image_to_tensor
from lora_core.errors import UserError
from lora_core.text import shorten_value
from models.components import config_errors, load_network, load_part, read_json
from models.segmenter import read_preparation

MOST_TOKENS = 60  # of a caption: a text encoder of CLIP reads 75
BEAMS = 3  # of the search, as in both models' own examples; the same caption in each run
REQUEST = "Describe in detail what is shown in the image."  # Florence-2's <DETAILED_CAPTION>
NETWORKS = {
    "blip": (BlipForConditionalGeneration, BertTokenizer),
    "florence2": (Florence2ForConditionalGeneration, BartTokenizer),
}


class Captioner:
    """The network and tokenizer of a captioning model, and how its images are scaled.

    The images are prepared here: the processors of the library would need torchvision. Raises
    UserError for a folder or hub id that is neither a BLIP nor a Florence-2 model.
    """

    def __init__(self, path: str, device: torch.device | str) -> None:
        kind = read_json(path, "config.json").get("model_type")
        if kind not in NETWORKS:
            raise UserError(
                f"the model {path} is of the type {shorten_value(kind)}, expected blip or "
                "florence2; give the folder or hub id of a captioning model, such as "
                "Salesforce/blip-image-captioning-large or florence-community/Florence-2-base"
            )
        network, tokenizer = NETWORKS[kind]
        self.path, self.device, self.kind = path, torch.device(device), kind
        self.network = load_network(network, path, "", torch.float32, device)
        self.tokenizer = load_part(tokenizer.from_pretrained, path, "")
        self.side, self.mean, self.std = read_preparation(path)
        self.network.requires_grad_(False).eval()

    @torch.no_grad()
    def describe(self, image: Image.Image, beginning: str = "") -> str:
        """The caption of an RGB image, which may be empty.

        `beginning` is what a caption of BLIP begins with. Raises UserError for one that is given to
        Florence-2, which answers a request, and for weights that give NaN.
        """
        if beginning and self.kind != "blip":
            raise UserError(
                f"{self.path} is a Florence-2 model, whose captions cannot begin with "
                f"{beginning!r}; leave that out or take a BLIP model"
            )
        pixels = self.prepare_pixels(image).to(self.device)
        with config_errors(self.path):
            if self.kind == "blip":
                written = self._continue_words(pixels, beginning)
            else:
                written = self._answer_request(pixels)
        text = self.tokenizer.decode(written[0], skip_special_tokens=True)
        return " ".join(text.split())

    def prepare_pixels(self, image: Image.Image) -> Tensor:
        """[1, 3, side, side], normalized; both models squeeze an image into a square."""
        square = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return ((image_to_tensor(square) / 255 - self.mean) / self.std)[None]

    def _continue_words(self, pixels: Tensor, beginning: str) -> Tensor:
        """The token ids of a caption of BLIP."""
        words: dict[str, Any] = {}
        if beginning:
            read = self.tokenizer(beginning, return_tensors="pt").to(self.device)
            words = {"input_ids": read.input_ids, "attention_mask": read.attention_mask}
        return self.network.generate(
            pixel_values=pixels, max_length=MOST_TOKENS, num_beams=BEAMS, do_sample=False, **words
        )

    def _answer_request(self, pixels: Tensor) -> Tensor:
        """The token ids of Florence-2's answer to the request.

        The encoder reads a token for each feature of the image, then the request.
        """
        ids = torch.tensor([self.request_ids(self._count_features(pixels))], device=self.device)
        return self.network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=MOST_TOKENS,
            num_beams=BEAMS,
            do_sample=False,
        )

    def request_ids(self, count: int) -> list[int]:
        """The tokens of `count` features of an image and of the request."""
        words = self.tokenizer(REQUEST, add_special_tokens=False).input_ids
        ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [self.network.config.image_token_id] * count + [ends[0], *words, ends[1]]

    def _count_features(self, pixels: Tensor) -> int:
        features = self.network.get_image_features(pixels).pooler_output
        return features.numel() // features.shape[-1]
