"""CompVis' names of the layers of UNets with other numbers of blocks."""

import torch

from lora_core.formats.compvis import unet_module_names
from lora_core.formats.layout import layout_of
from models.sdxl import sdxl_layout
from tests import tiny_sdxl
from tests.tiny_sdxl import FULL_UNET


def test_names_follow_the_unets_own_blocks() -> None:
    """The refiner's four blocks, of which the first and last have no attention: an upsampler then
    stands one place earlier.
    """
    kinds = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
        "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(384, 768, 1536, 1536),
        transformer_layers_per_block=4, attention_head_dim=[6, 12, 24, 24],
        cross_attention_dim=1280, projection_class_embeddings_input_dim=2560,
    )  # fmt: skip
    with torch.device("meta"):
        unet = tiny_sdxl.UNet2DConditionModel(**(FULL_UNET | kinds))
    names = sdxl_layout(unet, {"text_encoder_2": tiny_sdxl.full_size()[2]}).components["unet"].names
    others = {
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
        "up_blocks.3.resnets.0.conv1": "output_blocks.9.0.in_layers.2",
    }  # fmt: skip
    assert {path: names[path] for path in others} == others and len(set(names.values())) == len(
        names
    )
    shallow = tiny_sdxl.UNet2DConditionModel(
        **(dict(tiny_sdxl.unet().config) | {"layers_per_block": 1})
    )
    names = unet_module_names(layout_of({"unet": shallow}).components["unet"].shapes)
    assert (
        names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.2.0.op"
        and names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.2.conv"
    )
    assert names["down_blocks.1.attentions.0.proj_in"] == "input_blocks.3.1.proj_in"
