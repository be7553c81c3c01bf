"""Layouts: blocks that lists of weights name, published names and prefixes of encoders."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_core.adapters import injection
from lora_core.adapters.targets import matches_pattern
from lora_core.errors import UserError
from lora_core.formats import layout_of
from merging.block_weights import BLOCK_LISTS, BLOCKS, factor_by_block, parse_block_weights
from models import sd, sdxl
from tests.tiny_pipeline import pipeline


@pytest.fixture(scope="module")
def layouts():
    """Stable Diffusion 1.5 and XL at full size, without weights."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12
    )
    with torch.device("meta"):
        plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        large = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
        first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    return {
        17: sd.sd_layout(plain, first, {}),
        12: sdxl.sdxl_layout(large, {"text_encoder": first, "text_encoder_2": second}),
    }


def hit(layout, globs):
    """The blocks of all layers that the globs match, and of the text encoders."""
    globs = (*globs, "*self_attn*")
    found = set()
    for name, part in layout.components.items():
        for path in part.shapes:
            if any(matches_pattern(path, glob) for glob in globs):
                found.add(layout.block_of(name, path))
    return found


@pytest.mark.parametrize("length", [17, 12])
def test_short_lists_name_the_blocks_with_attention(layouts, length):
    assert (
        hit(layouts[length], ("*.attentions.*",)) == set(BLOCK_LISTS[length])
        and length in layouts[length].block_lists
    )


def test_a_list_of_20_names_all_blocks(layouts):
    assert (
        hit(layouts[12], ("*.attentions.*", "*.resnets.*", "*samplers.*", "conv_in"))
        == set(BLOCK_LISTS[20])
        and 20 in layouts[12].block_lists
    )
    assert hit(layouts[17], ("*.attentions.*", "*.resnets.*", "*samplers.*", "conv_in")) == set(
        range(26)
    )


@pytest.mark.parametrize(
    "length, path, block",
    [  # by sd-scripts' rules: 3 entries a block, the encoder's third its downsampler; 0 is conv_in
        (17, "conv_in", "IN00"),
        (17, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "IN01"),
        (17, "down_blocks.0.resnets.1.conv1", "IN02"),
        (17, "down_blocks.0.downsamplers.0.conv", "IN03"),
        (17, "down_blocks.2.attentions.1.proj_in", "IN08"),
        (17, "down_blocks.3.resnets.1.conv2", "IN11"),
        (17, "mid_block.attentions.0.proj_in", "MID"),
        (17, "mid_block.resnets.1.conv1", "MID"),
        (17, "up_blocks.0.upsamplers.0.conv", "OUT02"),
        (17, "up_blocks.1.attentions.0.proj_out", "OUT03"),
        (17, "up_blocks.3.attentions.2.proj_out", "OUT11"),
        (12, "down_blocks.1.attentions.0.proj_in", "IN04"),
        (12, "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", "IN08"),
        (12, "up_blocks.0.attentions.2.proj_in", "OUT02"),
        (12, "up_blocks.2.resnets.2.conv1", "OUT08"),
    ],
)
def test_blocks_are_numbered_as_the_original_code_numbers_them(layouts, length, path, block):
    assert (
        path in layouts[length].components["unet"].shapes
        and BLOCKS[layouts[length].block_of("unet", path)] == block
    )


def test_a_list_weighs_layers(layouts):
    share = factor_by_block(
        parse_block_weights(
            "0.5," + ",".join(str(i) for i in range(1, 17)), layouts[17].block_lists
        ),
        layouts[17].block_of,
    )
    assert share("text_encoder", "text_model.encoder.layers.0.mlp.fc1") == 0.5
    assert (
        share("unet", "mid_block.attentions.0.proj_in") == 7
        and share("unet", "up_blocks.3.attentions.2.proj_out") == 16
    )
    assert (
        share("unet", "time_embedding.linear_1") == 1
        and share("unet", "down_blocks.3.resnets.0.conv1") == 0
    )  # the one is in no block, the other in one that a list of 17 does not name


def test_tables_tell_the_width_of_rows(layouts):
    assert [
        layouts[12].components[name].width for name in ("unet", "text_encoder", "text_encoder_2")
    ] == [0, 768, 768]
    assert (
        sd.sd_layout((pipe := pipeline()).unet, pipe.text_encoder, {})
        .components["text_encoder"]
        .width
        == 16
    )


def test_layout_finds_published_names_in_both_clip_classes_and_back():
    config = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    plain, projected = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    layout = layout_of({"text_encoder": plain, "text_encoder_2": projected})
    name = "text_model.encoder.layers.0.mlp.fc1"
    assert layout.published("text_encoder", layout.module_path("text_encoder", name)) == name
    assert layout.published("text_encoder_2", layout.module_path("text_encoder_2", name)) == name
    assert (
        plain.get_submodule(layout.module_path("text_encoder", name)).weight.shape
        == layout.components["text_encoder"].shapes[name]
    )
    assert projected.get_submodule(layout.module_path("text_encoder_2", name)).weight.shape == (
        16,
        8,
    )
    assert [c.prefixes[0] for c in layout.components.values()] == ["lora_te1", "lora_te2"]
    with pytest.raises(
        UserError,
        match=r"no Linear or Conv2d named text_model.encoder.layers.0.mlp.fc3; "
        r"the nearest is \S*mlp.fc",
    ):
        layout.module_path("text_encoder", "text_model.encoder.layers.0.mlp.fc3")


def test_an_adapted_module_counts_as_its_base(pipe):
    modules = {"unet": pipeline().unet}
    before = layout_of(modules)
    injection.inject(modules["unet"], injection.AdapterSpec(targets=("*.to_q", "*.conv1"), rank=2))
    assert layout_of(modules) == before


def test_prefixes_and_token_keys_follow_what_an_encoder_is():
    net = nn.ModuleDict({"a": nn.Linear(2, 2)})
    modules = {"transformer": net, "text_encoder": net, "text_encoder_2": net}
    layout = layout_of(modules, encoders={"text_encoder": "clip_l", "text_encoder_2": "t5"})
    assert [c.prefixes[0] for c in layout.components.values()] == [
        "lora_unet",
        "lora_te1",
        "lora_te3",
    ] and layout.encoders["text_encoder_2"] == "t5"
    assert [c.prefixes[0] for c in layout_of(modules).components.values()] == [
        "lora_unet",
        "lora_te1",
        "lora_te2",
    ]
