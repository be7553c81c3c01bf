"""The part of a sum after an @: which layers it means, with which weights."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from lora_core.errors import UserError
from lora_core.formats.layout import Component, Layout
from merging.block_weights import BLOCK_PRESETS
from merging.layer_choice import ALL_BLOCKS, LAYER_GROUPS, multiply_factors, parse_layer_choice

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
        ("M00=0.5", [0, 0, 0, 0, 0, 0, 0.5, 0, 0, 0]),
        ("9," * 17 + "1", None),
        ("2,3,0,4,0,0,0,5,0,0,6,0,0,0,0,0,0", [0, 3, 3, 3, 3, 0, 5, 6, 2, 2]),
        ("[2, 3, 0, 4, 0, 0, 0, 5, 0, 0, 6, 0, 0, 0, 0, 0, 0]", [0, 3, 3, 3, 3, 0, 5, 6, 2, 2]),
        ("INS", [0, 1, 1, 1, 1, 0, 0, 0, 1, 1]),
        ("OUTD", [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]),
        ("NONE", [0] * 10),
        ("ALL0.5", [0, 0.5, 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_choices_mean_layers(text, weights):
    if weights is None:
        with pytest.raises(UserError, match="got 18 block weights"):
            parse_layer_choice(text, KEYS, LAYOUT)
        return
    chosen = parse_layer_choice(
        text, KEYS, LAYOUT
    )  # IN00 and IN03 are not in a list of 17, and so weigh 0
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
        ("OUTD", Layout("other", "", {}, {}, block_lists=(12, 20)), "takes a list of 12 or 20"),
        ("cross,", LAYOUT, "none of the 10 layers"),
    ],
)
def test_choices_without_effect_are_refused(text, layout, sentence):
    if sentence is None:
        assert parse_layer_choice(text, KEYS, layout)("unet", PATHS[1]) == 1
        return
    with pytest.raises(UserError, match=sentence):
        parse_layer_choice(text, KEYS, layout)


def test_names_of_lists_are_no_names_of_groups_or_blocks():
    assert not set(BLOCK_PRESETS) & {*LAYER_GROUPS, *ALL_BLOCKS}


# ---------------------------------------------------------------- through the command

LOCON = {  # a layer of Stable Diffusion 1's UNet or text encoder -> (out, fan-in, kernel)
    "lora_unet_conv_in": (320, 4, 3),
    "lora_unet_down_blocks_0_downsamplers_0_conv": (320, 320, 3),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (640, 640, 0),
    "lora_unet_mid_block_resnets_0_conv1": (1280, 1280, 3),
    "lora_unet_up_blocks_0_resnets_0_conv1": (1280, 2560, 3),
    "lora_unet_up_blocks_3_attentions_2_proj_in": (320, 320, 1),
    "lora_unet_time_embedding_linear_1": (1280, 320, 0),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768, 0),
}
FLUX = {  # a layer of Flux under kohya's names -> (out, in)
    "lora_unet_img_in": (3072, 64),
    "lora_unet_double_blocks_0_img_attn_proj": (3072, 3072),
    "lora_unet_double_blocks_18_txt_mlp_2": (3072, 12288),
    "lora_unet_single_blocks_0_linear2": (3072, 15360),
    "lora_unet_single_blocks_37_modulation_lin": (9216, 3072),
    "lora_unet_final_layer_linear": (64, 3072),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
NUMBERS = ",".join(str(i / 8) for i in range(61))


def save_rank_one(layers, path):
    """A file with one direction of norm 1 in each layer."""
    tensors = {}
    for name, (out, fan, *kernel) in layers.items():
        axes = (kernel[0],) * 2 if kernel and kernel[0] else ()
        tensors[f"{name}.lora_up.weight"] = torch.ones(out, 1, *(1 for _ in axes)) / out**0.5
        down = torch.ones(1, fan, *axes)
        tensors[f"{name}.lora_down.weight"] = down / down.numel() ** 0.5
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("layers", "model", "choice", "weights"),
    [
        (LOCON, "sd1", "MIDD", [0, 0, 0, 1, 0, 0, 1, 1]),
        (LOCON, "sd1", "OUTS", [0, 0, 0, 0, 0, 1, 1, 1]),
        (LOCON, "sd1", "ALL0.5", [0, 0, 0.5, 0.5, 0, 0.5, 1, 0.5]),
        (LOCON, "sd1", ",".join(f"0.{i:02}" for i in range(26)),
         [0.01, 0.04, 0.05, 0.13, 0.14, 0.25, 1, 0]),
        (FLUX, "flux-dev", NUMBERS, [2 / 8, 3 / 8, 21 / 8, 22 / 8, 59 / 8, 60 / 8, 0]),
        (FLUX, "flux-dev", "FLUXALL", [1] * 7),
        (FLUX, "flux-dev", "D00,S37=0.5,OUT=2", [0, 1, 0, 0, 0.5, 2, 0]),
    ],
)  # fmt: skip
def test_mix_weighs_blocks_as_a1111_does(tmp_path, layers, model, choice, weights):
    save_rank_one(layers, tmp_path / "a.safetensors")
    words = ["mix", f"{tmp_path}/a.safetensors@{choice}", "--out", f"{tmp_path}/o.safetensors"]
    assert merge.main([*words, "--model", model, "--format", "kohya"]) == 0
    found = load_file(tmp_path / "o.safetensors")
    norms = []
    for name in layers:
        if f"{name}.lora_up.weight" not in found:
            norms.append(0.0)
            continue
        up, down = found[f"{name}.lora_up.weight"], found[f"{name}.lora_down.weight"]
        norms.append(float(found[f"{name}.alpha"] * up.norm() * down.norm()))
    assert norms == pytest.approx(weights, rel=1e-4)


@pytest.mark.parametrize("choice", ["OUTD", "1,0,1", ",".join("1" * 26), "MID"])
def test_lists_of_another_network_are_refused(tmp_path, choice, capsys):
    save_rank_one(FLUX, tmp_path / "a.safetensors")
    words = ["mix", f"{tmp_path}/a.safetensors@{choice}", "--out", f"{tmp_path}/o.safetensors"]
    assert merge.main([*words, "--model", "flux-dev"]) == 2
    assert re.search("takes a list of 61|matches none", capsys.readouterr().err)
