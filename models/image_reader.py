"""Models of transformers that read images and words: weights, and how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from lora_core.data.images import image_to_tensor
from lora_core.errors import UserError
from lora_core.text import shorten_value
from models.components import LARGEST_SIDE, load_network, load_part, read_json


class ImageReader:
    """The network and tokenizer of such a model, and how its images are scaled and normalized.

    Images are prepared here: the processors of the library would need torchvision. Raises UserError
    for a folder or hub id of another model.
    """

    # model_type in config.json -> (the class of the network, that of the tokenizer)
    parts: ClassVar[Mapping[str, tuple[Any, Any]]]
    wanted: ClassVar[str]  # the model to give, for the message about another one

    def __init__(self, path: str, device: torch.device | str) -> None:
        kind = read_json(path, "config.json").get("model_type")
        if not isinstance(kind, str) or kind not in self.parts:
            raise UserError(
                f"the model {path} is of the type {shorten_value(kind)}, expected "
                f"{' or '.join(self.parts)}; give the folder or hub id of {self.wanted}"
            )
        network, tokenizer = self.parts[kind]
        self.path, self.device, self.kind = path, torch.device(device), kind
        self.network = load_network(network, path, "", torch.float32, device)
        self.network.requires_grad_(False).eval()
        self.tokenizer = load_part(tokenizer.from_pretrained, path, "")
        self.side, self.mean, self.std = read_preparation(path)

    def normalize(self, image: Image.Image) -> Tensor:
        """[3, h, w] of an RGB image, with the mean and deviation that the network expects."""
        return (image_to_tensor(image) / 255 - self.mean) / self.std

    def squeeze(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.BICUBIC
    ) -> Tensor:
        """[1, 3, side, side], normalized, of an RGB image that becomes a square as a whole."""
        return self.normalize(image.resize((self.side, self.side), resampling))[None]

    def tokenize(self, texts: list[str], length: int) -> dict[str, Tensor]:
        """input_ids and attention_mask [b, length] of texts, cut off or padded, on the device."""
        read = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return {name: read[name].to(self.device) for name in ("input_ids", "attention_mask")}


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
