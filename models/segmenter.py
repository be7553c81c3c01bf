"""CLIPSeg: masks of the part of an image that some words name (arXiv 2112.10003)."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from lora_core.data.images import image_to_tensor
from lora_core.errors import UserError
from lora_core.text import shorten_value
from models.components import LARGEST_SIDE, load_network, load_part, read_json, read_prompt_length

BIAS = 0.01  # of lora_ppim, so that no part of an image is left out wholly


class ClipSegmenter:
    """CLIPSeg's network and tokenizer, and how its images are scaled and normalized.

    The images are prepared here: the processor of the library would need torchvision. Raises
    UserError for a folder or hub id that is no CLIPSeg model.
    """

    def __init__(self, path: str, device: torch.device | str) -> None:
        found = read_json(path, "config.json").get("model_type")
        if found != "clipseg":
            raise UserError(
                f"the model {path} is of the type {shorten_value(found)}, expected clipseg; give "
                "the folder or hub id of a CLIPSeg model"
            )
        self.path, self.device = path, torch.device(device)
        self.network = load_network(CLIPSegForImageSegmentation, path, "", torch.float32, device)
        self.tokenizer = load_part(CLIPTokenizer.from_pretrained, path, "")
        self.side, self.mean, self.std = read_preparation(path)
        self.network.requires_grad_(False).eval()

    @torch.no_grad()
    def find(self, image: Image.Image, words: str, temperature: float = 1.0) -> Image.Image | None:
        """The mask of an RGB image, in mode L and of its size; None where the words fit nothing.

        They fit nothing where the mask is nowhere twice as bright as at its darkest pixel. A
        `temperature` above 1 makes masks softer. Raises UserError for weights that give NaN.
        """
        square = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        pixels = (image_to_tensor(square) / 255 - self.mean) / self.std
        ids = self.tokenizer(
            [words, ""],
            padding="max_length",
            max_length=read_prompt_length(self.tokenizer),
            truncation=True,
            return_tensors="pt",
        )
        logits = self.network(
            input_ids=ids.input_ids.to(self.device),
            attention_mask=ids.attention_mask.to(self.device),
            pixel_values=pixels.expand(2, -1, -1, -1).to(self.device),
        ).logits
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


def read_preparation(path: str) -> tuple[int, Tensor, Tensor]:
    """(side in pixels, mean [3, 1, 1], std [3, 1, 1]) of the images that a network takes.

    They are in preprocessor_config.json, which recent versions of the library write into
    processor_config.json.
    """
    table: Any
    try:
        table = read_json(path, "preprocessor_config.json")
        name = "preprocessor_config.json"
    except UserError as error:
        try:
            table = read_json(path, "processor_config.json").get("image_processor", {})
        except UserError:
            raise error from None
        name = "processor_config.json"
    size = table.get("size")
    side: Any = size
    if isinstance(size, dict):
        side = size.get("height", size.get("shortest_edge"))
    elif isinstance(size, list) and len(size) == 2 and size[0] == size[1]:  # OWL-ViT's
        side = size[0]
    mean, std = table.get("image_mean"), table.get("image_std")
    is_side = type(side) is int and 1 <= side <= LARGEST_SIDE
    if not (is_side and _is_color(mean) and _is_color(std) and min(std) > 0):
        raise UserError(
            f"{name} of {path} has size {shorten_value(size)}, image_mean {shorten_value(mean)} "
            f"and image_std {shorten_value(std)}; expected a side and three numbers each; fetch "
            "the model again"
        )
    shape = (3, 1, 1)
    return side, torch.tensor(mean).view(shape), torch.tensor(std).view(shape)


def _is_color(value: Any) -> bool:
    """Whether it is a list of three numbers."""
    is_three = isinstance(value, list) and len(value) == 3
    return is_three and all(type(number) in (int, float) for number in value)
