"""The part of a sum after an @: which layers it means, with which weights."""

import pytest

from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout
from merging.layer_choice import BLOCK_PRESETS, LAYER_GROUPS, multiply_factors, parse_layer_choice

PATHS = [
    "conv_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.1.attentions.2.proj_in",
]
TEXT = ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"]
KEYS = [("unet", path) for path in PATHS] + [("text_encoder", path) for path in TEXT]
BLOCKS = dict(zip(PATHS, (1, 2, 2, 2, 2, 4, 13, 19)))
UNET, ENCODER = (
    Component(("lora_unet",), dict.fromkeys(PATHS, (4, 4)), blocks=BLOCKS),
    Component(("lora_te",), dict.fromkeys(TEXT, (4, 4))),
)
LAYOUT = Layout(
    "tiny",
    "",
    {"unet": UNET, "text_encoder": ENCODER},
    {"text_encoder": "clip_l"},
    {"unet": {"mine": ("*.proj_in",)}},
    block_lists=(17, 26),
)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("attn", [0, 1, 1, 0, 0, 0, 0, 0, 1, 0]),
        ("self", [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]),
        ("cross", [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ("ff", [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]),
        ("conv", [1, 0, 0, 0, 1, 1, 0, 0, 0, 0]),
        ("unet", [1] * 8 + [0] * 2),
        ("text", [0] * 8 + [1] * 2),
        ("text_encoder", [0] * 8 + [1] * 2),
        ("~conv", [0, 1, 1, 1, 0, 0, 1, 1, 1, 1]),
        ("attn=0.5,attn2.*=2,conv_in", [1, 0.5, 2, 0, 0, 0, 0, 0, 0.5, 0]),
        ("unet,~conv", [0, 1, 1, 1, 0, 0, 1, 1, 0, 0]),
        ("down_blocks.*.to_q", [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("mid_block", [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        ("unet.down_blocks.0.downsamplers.*", [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        ("mine", [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]),
        ("BASE,IN03=0.25,MID", [0, 0, 0, 0, 0, 0.25, 1, 0, 1, 1]),
        ("9," * 17 + "1", None),
        ("2,3,0,4,0,0,0,5,0,0,6,0,0,0,0,0,0", [1, 3, 3, 3, 3, 1, 5, 6, 2, 2]),
        ("[2, 3, 0, 4, 0, 0, 0, 5, 0, 0, 6, 0, 0, 0, 0, 0, 0]", [1, 3, 3, 3, 3, 1, 5, 6, 2, 2]),
        ("INS", [1, 1, 1, 1, 1, 1, 0, 0, 1, 1]),
        ("OUTD", [1, 0, 0, 0, 0, 1, 0, 1, 1, 1]),
    ],
)
def test_choices_mean_layers(text, weights):
    if weights is None:
        with pytest.raises(UserError, match="got 18 block weights"):
            parse_layer_choice(text, KEYS, LAYOUT)
        return
    chosen = parse_layer_choice(
        text, KEYS, LAYOUT
    )  # IN00 and IN03 are not in a list of 17, and so weigh 1
    assert [chosen(*key) for key in KEYS] == weights


def test_choices_multiply():
    both = multiply_factors(
        [parse_layer_choice("attn=0.5", KEYS, LAYOUT), parse_layer_choice("unet", KEYS, LAYOUT)]
    )
    assert [both(*key) for key in KEYS] == [0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "layout", "sentence"),
    [
        ("atn", LAYOUT, "nearest: .*attn"),
        ("attn", None, None),
        ("IN09", LAYOUT, "none of the 10 layers"),
        ("MID", None, "name it with --model"),
        ("OUTD", None, "name it with --model"),
        ("attn=x", LAYOUT, "is not a number"),
        ("~attn=0.5", LAYOUT, "drop the ~ or the ="),
        ("1,0,1", LAYOUT, "takes a list of 17 or 26"),
        ("MID", Layout("flow", "", {}, {}), "no blocks"),
        ("OUTD", Layout("other", "", {}, {}, block_lists=(12, 20)), "takes 12 or 20 numbers"),
        ("cross,", LAYOUT, "none of the 10 layers"),
    ],
)
def test_choices_without_effect_are_refused(text, layout, sentence):
    if sentence is None:
        assert parse_layer_choice(text, KEYS, layout)("unet", PATHS[1]) == 1
        return
    with pytest.raises(UserError, match=sentence):
        parse_layer_choice(text, KEYS, layout)


def test_lists_of_presets_fit_their_length():
    assert all(max(ones) < 17 for ones in BLOCK_PRESETS.values()) and not set(BLOCK_PRESETS) & set(
        LAYER_GROUPS
    )
