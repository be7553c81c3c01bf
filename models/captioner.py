"""BLIP and Florence-2: captions of images (arXiv 2201.12086, 2311.06242)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
)

from lora_core.errors import UserError
from models.components import config_errors
from models.image_reader import ImageReader

MOST_TOKENS = 60  # of a caption: a text encoder of CLIP reads 75
BEAMS = 3  # of the search, as in both models' own examples; the same caption in each run
REQUEST = "Describe in detail what is shown in the image."  # Florence-2's <DETAILED_CAPTION>


class Captioner(ImageReader):
    """BLIP or Florence-2: a sentence about an image."""

    parts: ClassVar = {
        "blip": (BlipForConditionalGeneration, BertTokenizer),
        "florence2": (Florence2ForConditionalGeneration, BartTokenizer),
    }
    wanted = (
        "a captioning model, such as Salesforce/blip-image-captioning-large or "
        "florence-community/Florence-2-base"
    )

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
        pixels = self.squeeze(image).to(self.device)
        with config_errors(self.path):
            if self.kind == "blip":
                written = self._continue_words(pixels, beginning)
            else:
                written = self._answer_request(pixels)
        text = self.tokenizer.decode(written[0], skip_special_tokens=True)
        return " ".join(text.split())

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
