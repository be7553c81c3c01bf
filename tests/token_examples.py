"""Token rows, encoders of two widths, and an A1111 dictionary of them."""

import torch
from torch import nn

from lora_core.formats.layout import Component, Layout


def layout_of_widths(**widths):
    """Encoders with these widths: clip_l=4, clip_g=6."""
    names = ("text_encoder", "text_encoder_2")[: len(widths)]
    parts = {name: Component((), {}, width=width) for name, width in zip(names, widths.values())}
    return Layout("f", "v1", parts, dict(zip(names, widths)))


ONE, PAIR = layout_of_widths(clip_l=4), layout_of_widths(clip_l=4, clip_g=6)
ROWS, WIDE = torch.randn(2, 4), torch.randn(2, 6)


def parameters(rows):
    return nn.ParameterDict({"*": nn.Parameter(rows)})


A1111 = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": ROWS},
    "name": "dog",
    "step": 7,
    "sd_checkpoint": None,
    "sd_checkpoint_name": "x",
}
