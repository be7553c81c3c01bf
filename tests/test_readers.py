"""Adapters as other programs write them.

Peers are peft, diffusers' loaders, and the architecture at full size.
"""

import hashlib
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file
from safetensors.torch import save_file as save_distinct
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank, delta_weight, scaled_product
from lora_core.errors import UserError
from lora_core.formats import layout_of
from models import flux, sd, sdxl
from tests import tiny_flux, tiny_sdxl
from tests.test_formats import apply, disagreement
from tests.tiny_pipeline import outputs, pipeline, random_state

ATTENTION = {"unet": ("*attn?.to_*",), "text": ("*self_attn*proj",)}
SHORT = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out.0": "to_out",
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "out_proj": "to_out",
}


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def layout(pipe):
    return layout_of(
        {"unet": pipe.unet, "text_encoder": pipe.text_encoder}, base_model_version="sd_v1"
    )


def save_file(tensors, path, metadata=None):
    save_distinct(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata
    )
    return path


def same(read, written):
    """Bitwise."""
    assert {c: set(m) for c, m in read.components.items()} == {
        c: set(m) for c, m in written.components.items()
    }
    for component, modules in written.components.items():
        for path, lr in modules.items():
            got = read.components[component][path]
            assert (
                torch.equal(got.down, lr.down)
                and torch.equal(got.up, lr.up)
                and got.scale == pytest.approx(lr.scale, rel=1e-7)
            ), path
            assert (got.magnitude is None) == (lr.magnitude is None) and (
                lr.magnitude is None or torch.equal(got.magnitude, lr.magnitude)
            )


def close(read, written):
    for component, modules in written.components.items():
        assert set(read.components[component]) == set(modules)
        for path, lr in modules.items():
            torch.testing.assert_close(
                scaled_product(read.components[component][path]),
                scaled_product(lr),
                rtol=1e-6,
                atol=1e-6,
            )


# ---------------------------------------------------------------- spellings of diffusers and peft


def short(path):
    """The path with a projection's name in attention processors at its end."""
    end = next(end for end in SHORT if path.endswith("." + end))
    return path[: -len(end)], SHORT[end]


def processors(component, path):
    start, name = short(path)
    return (
        f"{component}.{start}{'processor.' if component == 'unet' else ''}{name}_lora",
        "down.weight",
        "up.weight",
        "alpha",
    )


STYLES = {  # (component, path) -> (module, leaf of down, leaf of up, of alpha)
    "A B": lambda c, p: (f"{c}.{p}", "lora_A.weight", "lora_B.weight", "alpha"),
    "lora": lambda c, p: (f"{c}.{p}", "lora.down.weight", "lora.up.weight", "alpha"),
    "linear layer": lambda c, p: (
        f"{c}.{p}",
        "lora_linear_layer.down.weight",
        "lora_linear_layer.up.weight",
        "alpha",
    ),
    "kohya's leaves": lambda c, p: (f"{c}.{p}", "lora_down.weight", "lora_up.weight", "alpha"),
    "named": lambda c, p: (f"{c}.{p}", "lora_A.my_run.weight", "lora_B.my_run.weight", "alpha"),
    "bare": lambda c, p: (f"{c}.{p}", "lora_A", "lora_B", "alpha"),
    "peft inside": lambda c, p: (
        f"{c}.base_model.model.{p}",
        "lora_A.weight",
        "lora_B.weight",
        "alpha",
    ),
    "no level": lambda c, p: (
        f"{c}.{p.removeprefix('text_model.')}",
        "lora_A.weight",
        "lora_B.weight",
        "alpha",
    ),
    "to_out": lambda c, p: (
        f"{c}.{p.replace('to_out.0', 'to_out')}",
        "lora.down.weight",
        "lora.up.weight",
        "alpha",
    ),
    "processors": processors,
    "mixed": lambda c, p: STYLES["lora" if "to_" in p else "linear layer" if "mlp" in p else "A B"](
        c, p
    ),
}


def respelled(state, style, *, alpha=False):
    tensors = {}
    for component, modules in state.components.items():
        for path, lr in modules.items():
            module, down, up, leaf = STYLES[style](component, path)
            tensors |= {f"{module}.{down}": lr.down, f"{module}.{up}": lr.up}
            if alpha:
                tensors[f"{module}.{leaf}"] = torch.tensor(lr.scale * lr.rank)
    return tensors


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_diffusers_is_read(pipe, layout, tmp_path, style, alpha):
    state = random_state(
        pipe, scale=0.5 if alpha else 1.0, **(ATTENTION if style == "processors" else {})
    )
    file = save_file(respelled(state, style, alpha=alpha), tmp_path / "a.safetensors")
    same(formats.load(file, layout), state)
    if style not in ("processors", "to_out", "peft inside"):
        same(formats.load(file), state)


@pytest.mark.parametrize("style", ["A B", "lora", "linear layer", "processors"])
def test_diffusers_reads_these_spellings_alike(layout, tmp_path, style):
    """Its loader does not read the others: it loses their modules, or raises."""
    theirs, mine = pipeline(), pipeline()
    base, state = outputs(mine), random_state(mine, scale=1.0, **ATTENTION)
    unet, text = (
        {c: m for c, m in state.components.items() if c == name}
        for name in ("unet", "text_encoder")
    )
    spell_unet, spell_text = {"linear layer": ("A B", "linear layer"), "lora": ("lora", "A B")}.get(
        style, (style, style)
    )
    tensors = respelled(AdapterState(unet), spell_unet) | respelled(AdapterState(text), spell_text)
    file = save_file(tensors, tmp_path / "a.safetensors")
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    read = formats.load(file, layout)
    apply(mine, read, layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5


MAGNITUDES = [
    "lora_magnitude_vector",
    *(f"lora_magnitude_vector.{end}" for end in ("weight", "x.weight", "x")),
    "dora_scale",
]


@pytest.mark.parametrize("leaf", MAGNITUDES)
def test_every_spelling_of_a_magnitude_is_read(pipe, layout, tmp_path, leaf):
    state = random_state(pipe, scale=1.0, dora=True)
    tensors = respelled(state, "A B")
    for component, modules in state.components.items():
        for path, lr in modules.items():
            tail = [1] * (lr.down.ndim - 1)
            shape = (
                (-1, *tail)
                if leaf == "dora_scale"
                else (1, -1, 1, 1)
                if lr.down.ndim == 4
                else (-1,)
            )
            tensors[f"{component}.{path}.{leaf}"] = lr.magnitude.reshape(shape)
    file = save_file(tensors, tmp_path / "a.safetensors")
    same(formats.load(file, layout), state)
    same(formats.load(file), state)


def test_two_adapters_in_one_file_are_refused(pipe, layout, tmp_path):
    tensors = respelled(random_state(pipe), "named")
    file = save_file(
        tensors | {next(iter(tensors)).replace("my_run", "other"): torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(
        UserError, match=r"has the adapters (my_run|other) .* and (my_run|other) .*, expected one"
    ):
        formats.load(file, layout)


def test_names_of_attention_processors_need_a_layout_and_may_lack_the_component(
    pipe, layout, tmp_path
):
    """diffusers' UNet files of early 2023 begin with the path."""
    state = random_state(pipe, scale=1.0, unet=ATTENTION["unet"], text=())
    tensors = respelled(state, "processors")
    with pytest.raises(UserError, match=r"names of old attention processors .*; name the model"):
        formats.load(save_file(tensors, tmp_path / "a.safetensors"))
    file = save_file(
        {key.removeprefix("unet."): tensor for key, tensor in tensors.items()},
        tmp_path / "b.safetensors",
    )
    same(formats.load(file, layout), state)
    with pytest.raises(UserError, match=r"does not say which network its keys .*; name the model"):
        formats.load(file)


# ---------------------------------------------------------------- peft's settings


class Net(nn.Module):
    """Layers of one name in several places, which patterns tell apart."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict(
                    {"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 6), "conv": nn.Conv2d(4, 6, 3)}
                )
                for _ in range(3)
            ]
        )
        self.to_q = nn.Linear(8, 4)


SETTINGS = [
    {},
    {"lora_alpha": 3},
    {"lora_alpha": 3, "use_rslora": True},
    {
        "rank_pattern": {"to_k": 2, "blocks.1.to_q": 5},
        "alpha_pattern": {"blocks.0.to_k": 7, "to_k": 1},
    },
    {
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"[0-9].to_k": 1, "blocks.0.to_k": 7},
    },  # the first match wins, not the longest
    {
        "rank_pattern": {r"blocks\.\d+\.to_q": 3, "o_k": 7},
        "alpha_pattern": {r".*to_q": 1, "blocks.2": 9},
        "use_rslora": True,
    },
    {"use_dora": True, "lora_alpha": 3, "alpha_pattern": {"to_k": 2}},
]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_folder_of_peft_is_the_update_that_peft_makes(tmp_path, settings, binary):
    torch.manual_seed(0)
    net = Net()
    layout = layout_of(
        {"transformer": net, "text_encoder": nn.ModuleDict({"other": nn.Linear(2, 2)})}
    )
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights = {
        path: module.weight.detach().clone()
        for path, module in net.named_modules()
        if hasattr(module, "weight")
    }
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 4} | settings), target_modules=["to_q", "to_k", "conv"]
    )
    model = peft.get_peft_model(net, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.1, 1)
    model.save_pretrained(str(tmp_path))
    if binary:
        torch.save(
            load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin"
        )
        (tmp_path / "adapter_model.safetensors").unlink()
    read = formats.load(tmp_path, layout).components["transformer"]
    fresh = Net()
    fresh.load_state_dict({name: tensor for name, tensor in before.items()})
    merged = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).merge_and_unload()
    assert set(read) == set(weights)
    for path, lr in read.items():
        torch.testing.assert_close(
            weights[path] + delta_weight(lr, weights[path]),
            merged.get_submodule(path).weight,
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_header_of_diffusers_tells_ranks_and_alphas_by_layer(layout, tmp_path):
    """diffusers writes and reads it; one pattern for both networks, whose first match differs."""
    theirs, mine = pipeline(), pipeline()
    base = outputs(mine)
    patterns = {
        "rank_pattern": {"to_q": 2, "q_proj": 3},
        "alpha_pattern": {"attn2.to_q": 9, "to_q": 5, "layers.0.self_attn.q_proj": 1},
    }
    config = {"r": 4, "lora_alpha": 2, "use_rslora": True, **patterns}
    for network, targets in (
        (theirs.unet, ["to_q", "to_v", "conv1"]),
        (theirs.text_encoder, ["q_proj", "fc1"]),
    ):
        network.add_adapter(peft.LoraConfig(**config, target_modules=targets))
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.uniform_(parameter, -0.5, 0.5)
    layers = {
        f"{name}_lora_layers": peft.get_peft_model_state_dict(getattr(theirs, name))
        for name in ("unet", "text_encoder")
    }
    recorded = {
        f"{n}_lora_adapter_metadata": getattr(theirs, n).peft_config["default"].to_dict()
        for n in ("unet", "text_encoder")
    }
    theirs.save_lora_weights(str(tmp_path), **layers, **recorded)
    apply(mine, formats.load(tmp_path / formats.NATIVE, layout), layout)
    assert disagreement(outputs(mine), outputs(theirs), base) < 1e-5


def test_peft_finds_its_network_by_paths_then_shapes_then_the_folders_name(tmp_path, capsys):
    small, large, equal = (
        nn.ModuleDict({"encoder": nn.ModuleDict({"fc1": nn.Linear(n, 4)})}) for n in (6, 8, 8)
    )
    layout = layout_of(
        {
            "unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)}),
            "text_encoder": small,
            "text_encoder_2": large,
            "text_encoder_3": equal,
        }
    )
    for inner, expected in ((6, "text_encoder"), (8, "text_encoder_2")):
        tensors = {
            "base_model.model.encoder.fc1.lora_A.weight": torch.ones(1, inner),
            "base_model.model.encoder.fc1.lora_B.weight": torch.ones(4, 1),
        }
        file = save_file(tensors, tmp_path / "adapter_model.safetensors")
        if inner == 6:
            assert list(formats.load(file, layout).components) == [expected]
            assert (
                "no adapter_config.json next to it; its strength is taken as alpha = r"
                in capsys.readouterr().err
            )
        else:
            with pytest.raises(
                UserError,
                match="fits text_encoder_2 and text_encoder_3 alike; "
                "put it into a folder called like",
            ):
                formats.load(file, layout)
    (tmp_path / "pipe" / "text_encoder_3").mkdir(parents=True)
    (tmp_path / "pipe" / "unet").mkdir()
    (tmp_path / "pipe" / "text_encoder_3" / "adapter_config.json").write_text(
        json.dumps({"r": 1, "lora_alpha": 3})
    )
    file.rename(tmp_path / "pipe" / "text_encoder_3" / file.name)
    (tmp_path / "pipe" / "unet" / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 3})
    )
    factors = {
        "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 1, 1),
        "base_model.model.conv.lora_B.weight": torch.ones(6, 2, 1, 1),
    }
    save_file(factors, tmp_path / "pipe" / "unet" / file.name)
    read = formats.load(tmp_path / "pipe", layout).components
    assert {name: [lr.scale for lr in modules.values()] for name, modules in read.items()} == {
        "unet": [1.5],
        "text_encoder_3": [3.0],
    }


@pytest.mark.parametrize(
    "config, expected",
    [
        ("{", "broken"),
        ("[]", "expected a JSON object"),
        ({"peft_type": "LOHA"}, "LOHA adapter, expected LORA"),
        ({"r": "a"}, "a rank of 'a'"),
        ({"r": 3}, "tensors of rank 2, its settings have r = 3"),
        ({"r": 2, "use_dora": True}, "no magnitude for conv"),
        ({"r": 2, "lora_alpha": None}, "an alpha of None"),
        ({"r": 2, "rank_pattern": [1]}, r"rank_pattern \[1\]"),
        ({"r": 2, "alpha_pattern": {"(": 2}}, "not a regular expression"),
    ],
)
def test_broken_settings_are_refused(tmp_path, config, expected):
    layout = layout_of({"unet": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 1)})})
    factors = {
        "base_model.model.conv.lora_A.weight": torch.ones(2, 4, 1, 1),
        "base_model.model.conv.lora_B.weight": torch.ones(6, 2, 1, 1),
    }
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    with pytest.raises(UserError, match=expected):
        formats.load(tmp_path, layout)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        formats.load(tmp_path, layout)


def test_a_state_dict_of_torch_save_is_read_without_executing_it(pipe, layout, tmp_path):
    state = random_state(pipe, scale=1.0)
    torch.save(respelled(state, "A B"), tmp_path / "pytorch_lora_weights.bin")
    same(formats.load(tmp_path / "pytorch_lora_weights.bin", layout), state)
    torch.save(
        {"state_dict": respelled(state, "A B")},
        tmp_path / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    same(formats.load(tmp_path / "old.ckpt", layout), state)


# ---------------------------------------------------------------- the architectures at full size


@cache
def full(name):
    """(layout, networks) on the meta device."""
    clip = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    open_clip = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
    }
    with torch.device("meta"):
        if name == "1.5":
            return sd.sd_layout(
                UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
                CLIPTextModel(CLIPTextConfig(**clip)),
                {},
            )
        if name == "2.1":
            unet = UNet2DConditionModel(
                sample_size=96,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            )
            return sd.sd_layout(
                unet,
                CLIPTextModel(CLIPTextConfig(**open_clip)),
                {"prediction_type": "v_prediction"},
            )
        if name == "xl":
            unet, one, two = tiny_sdxl.full_size()
            return sdxl.sdxl_layout(unet, {"text_encoder": one, "text_encoder_2": two})
        t5 = T5EncoderModel(
            T5Config(
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        return flux.flux_layout(
            {
                "transformer": transformer,
                "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
                "text_encoder_2": t5,
            }
        )


MODULES = {"1.5": 282 + 72, "2.1": 282 + 138, "xl": 794 + 72 + 193, "flow": 504 + 72 + 168}


def everywhere(layout, *, scale, dtype=torch.bfloat16):
    """Rank 1 on every layer."""
    noise = torch.Generator().manual_seed(0)

    def factors(shape):
        down, up = (
            torch.randn(size, generator=noise).to(dtype)
            for size in ((1, *shape[1:]), (shape[0], 1, *[1] * (len(shape) - 2)))
        )
        return LowRank(down, up, scale)

    return AdapterState(
        {
            name: {path: factors(shape) for path, shape in part.shapes.items()}
            for name, part in layout.components.items()
        }
    )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_every_layer_of_every_family_comes_back_bit_for_bit(tmp_path, name, format):
    layout = full(name)
    state = everywhere(layout, scale=1.0 if format == "diffusers" else 0.75)
    assert sum(map(len, state.components.values())) == MODULES[name]
    formats.save(state, tmp_path / "a.safetensors", format=format, layout=layout)
    same(formats.load(tmp_path / "a.safetensors", layout), state)


@pytest.mark.parametrize("name", MODULES)
def test_the_update_is_the_same_in_either_format(tmp_path, name):
    layout = full(name)
    state = everywhere(layout, scale=0.7, dtype=torch.float32)
    few = {
        part: [(path, lr) for path, lr in modules.items() if lr.up.numel() * lr.down.numel() < 5e6]
        for part, modules in state.components.items()
    }
    state.components = {part: dict(modules[::31]) for part, modules in few.items() if modules}
    for format in ("diffusers", "kohya"):
        formats.save(state, tmp_path / f"{format}.safetensors", format=format, layout=layout)
        close(formats.load(tmp_path / f"{format}.safetensors", layout), state)


KOHYA = [  # (family, name in a file, component, path): as kohya, its forks and diffusers spell them
    (
        "1.5",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    (
        "1.5",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    ("1.5", "lora_unet_output_blocks_11_1_proj_in", "up_blocks.3.attentions.2.proj_in"),
    ("1.5", "lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("1.5", "lora_unet_middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
    ("1.5", "lycoris_mid_block_attentions_0_proj_out", "mid_block.attentions.0.proj_out"),
    (
        "2.1",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    ),
    (
        "xl",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
    ),
    (
        "xl",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    ),
    ("flow", "lora_unet_double_blocks_7_img_attn_proj", "transformer_blocks.7.attn.to_out.0"),
    (
        "flow",
        "lora_transformer_single_transformer_blocks_7_attn_to_q",
        "single_transformer_blocks.7.attn.to_q",
    ),
    (
        "flow",
        "lycoris_transformer_blocks_7_attn_add_k_proj",
        "transformer_blocks.7.attn.add_k_proj",
    ),
    ("xl", "lora_te2_text_model_encoder_layers_31_mlp_fc2", "text_model.encoder.layers.31.mlp.fc2"),
    (
        "flow",
        "lora_te3_encoder_block_3_layer_1_DenseReluDense_wo",
        "encoder.block.3.layer.1.DenseReluDense.wo",
    ),
    (
        "flow",
        "lora_te2_encoder_block_3_layer_1_DenseReluDense_wo",
        "encoder.block.3.layer.1.DenseReluDense.wo",
    ),
    (
        "1.5",
        "lora_te1_text_model_encoder_layers_3_self_attn_out_proj",
        "text_model.encoder.layers.3.self_attn.out_proj",
    ),
]
COMFY = [
    (
        "1.5",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    (
        "1.5",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
        "text_model.encoder.layers.1.mlp.fc1",
    ),
    (
        "2.1",
        "text_encoders.clip_h.transformer.text_model.encoder.layers.1.mlp.fc1",
        "text_model.encoder.layers.1.mlp.fc1",
    ),
    ("xl", "diffusion_model.output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
    (
        "xl",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.q_proj",
        "text_model.encoder.layers.31.self_attn.q_proj",
    ),
    ("flow", "diffusion_model.double_blocks.3.txt_mlp.2", "transformer_blocks.3.ff_context.net.2"),
    (
        "flow",
        "diffusion_model.transformer_blocks.3.attn.to_q",
        "transformer_blocks.3.attn.to_q",
    ),  # ai-toolkit
    ("flow", "transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q"),
    ("flow", "transformer.transformer_blocks.3.attn.to_q", "transformer_blocks.3.attn.to_q"),
    (
        "flow",
        "base_model.model.transformer_blocks.3.attn.to_q",
        "transformer_blocks.3.attn.to_q",
    ),  # fal
    (
        "flow",
        "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q",
        "encoder.block.3.layer.0.SelfAttention.q",
    ),
]


@pytest.mark.parametrize("leaves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("name, module, path", KOHYA + COMFY)
def test_names_in_the_wild(tmp_path, name, module, path, leaves):
    layout = full(name)
    candidates = [part for part in layout.components.values() if path in part.shapes]
    shape = (
        candidates[0].shapes[path]
        if "clip_g" not in module and "te2_text" not in module
        else candidates[-1].shapes[path]
    )
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    file = save_file(
        {
            f"{module}.{leaves[0]}.weight": down,
            f"{module}.{leaves[1]}.weight": up,
            f"{module}.alpha": torch.tensor(1),
        },
        tmp_path / "a.safetensors",
    )
    ((component, modules),) = formats.load(file, layout).components.items()
    assert (
        list(modules) == [path] and torch.equal(modules[path].up, up) and modules[path].scale == 0.5
    )
    assert component == next(
        n for n, part in reversed(list(layout.components.items())) if part.shapes.get(path) == shape
    )


# ------------------------------------------------------- one transformer under several names


@pytest.fixture(scope="module")
def flow():
    pipe = tiny_flux.pipeline()
    return flux.flux_layout(
        {
            "transformer": pipe.transformer,
            "text_encoder": pipe.text_encoder,
            "text_encoder_2": pipe.text_encoder_2,
        }
    )


def flow_state(layout, paths):
    noise, shapes = torch.Generator().manual_seed(1), layout.components["transformer"].shapes
    pairs = {
        path: (
            torch.randn(2, shapes[path][1], generator=noise),
            torch.randn(shapes[path][0], 2, generator=noise),
        )
        for path in paths
    }
    return AdapterState(
        {"transformer": {path: LowRank(down, up, 0.5) for path, (down, up) in pairs.items()}}
    )


def test_comfyuis_names_of_fused_and_turned_layers(flow, tmp_path):
    """The same tensors as kohya's, under dotted names; a swapped layer is not under our name."""
    state = flow_state(flow, flow.components["transformer"].shapes)
    kohya, comfy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    formats.save(state, kohya, format="kohya", layout=flow)
    part = formats.joined_layers.join_layout(flow).components["transformer"]
    dotted = {
        ("lora_unet." + part.names.get(path, path)).replace(".", "_"): "diffusion_model."
        + part.names.get(path, path)
        for path in part.shapes
    }
    tensors = load_file(kohya)
    save_file(
        {
            dotted[key.split(".")[0]] + key[len(key.split(".")[0]) :]: tensor
            for key, tensor in tensors.items()
        },
        comfy,
    )
    same(formats.load(comfy, flow), state)
    lr = state.components["transformer"]["norm_out.linear"]
    for module, expected in (
        ("lora_unet_norm_out_linear", lr.up),
        ("lora_unet_final_layer_adaLN_modulation_1", lr.up.roll(len(lr.up) // 2, 0)),
    ):
        file = save_file(
            {f"{module}.lora_down.weight": lr.down, f"{module}.lora_up.weight": lr.up},
            tmp_path / "c.safetensors",
        )
        assert torch.equal(
            formats.load(file, flow).components["transformer"]["norm_out.linear"].up, expected
        )
    twice = {}
    for module in ("lora_unet_norm_out_linear", "lora_unet_final_layer_adaLN_modulation_1"):
        twice |= {f"{module}.lora_down.weight": lr.down, f"{module}.lora_up.weight": lr.up}
    with pytest.raises(
        UserError, match=r"has norm_out.linear twice, alone and in final_layer.adaLN_modulation.1"
    ):
        formats.load(save_file(twice, tmp_path / "d.safetensors"), flow)


@pytest.mark.parametrize("head", ["", "diffusion_model."])
def test_files_of_xlabs_are_read_as_diffusers_converts_them(flow, tmp_path, head):
    width, tensors = 32, {}
    for i in range(2):
        for short, (inner, out) in {
            "qkv_lora1": (1, 3),
            "proj_lora1": (1, 1),
            "qkv_lora2": (1, 3),
            "proj_lora2": (1, 1),
        }.items():
            name = f"{head}double_blocks.{i}.processor.{short}"
            tensors |= {
                f"{name}.down.weight": torch.randn(2, inner * width),
                f"{name}.up.weight": torch.randn(out * width, 2),
            }
        for short, (inner, out) in {"qkv_lora": (1, 3), "proj_lora": (5, 1)}.items():
            name = f"{head}single_blocks.{i}.processor.{short}"
            tensors |= {
                f"{name}.down.weight": torch.randn(2, inner * width),
                f"{name}.up.weight": torch.randn(out * width, 2),
            }
    read = formats.load(save_file(tensors, tmp_path / "a.safetensors"), flow).components[
        "transformer"
    ]
    theirs = lora_conversion_utils._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    pairs = itertools.product(read, "AB")
    assert {f"transformer.{path}.lora_{x}.weight" for path, x in pairs} == set(theirs) and len(
        read
    ) == 2 * 8 + 2 * 4
    for path, lr in read.items():
        assert torch.equal(lr.down, theirs[f"transformer.{path}.lora_A.weight"]) and torch.equal(
            lr.up, theirs[f"transformer.{path}.lora_B.weight"]
        )


# ---------------------------------------------------------------- DoRA by rows or columns


def dora_file(tmp_path, shape, magnitude, header=None, name="lora_unet_a"):
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, *shape[1:]),
        f"{name}.lora_up.weight": torch.randn(shape[0], 2, *[1] * (len(shape) - 2)),
    }
    return save_file(
        tensors | {f"{name}.dora_scale": magnitude}, tmp_path / "a.safetensors", header
    )


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Linear(5, 5), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)], ids=str
)
def test_a_dora_by_columns_is_lycoris_formula(tmp_path, layer):
    """(W + P) * m / norm over all but the inputs, as LyCORIS merges it without wd_on_output.

    It survives a round trip.
    """
    weight = layer.weight.detach()
    layout = layout_of({"unet": nn.ModuleDict({"a": layer})})
    magnitude = torch.rand(1, weight.shape[1], *[1] * (weight.ndim - 2)) + 0.5
    file = dora_file(tmp_path, weight.shape, magnitude)
    with pytest.raises(UserError, match=r"is a DoRA by columns; merge\.py fold"):
        formats.load(file, layout)
    state = formats.load(file, layout, merging=True)
    lr = state.components["unet"]["a"]
    merged = weight + scaled_product(lr)
    norm = (
        merged.transpose(0, 1)
        .reshape(weight.shape[1], -1)
        .norm(dim=1)
        .reshape(-1, *[1] * (weight.ndim - 1))
        .transpose(0, 1)
    )
    torch.testing.assert_close(
        weight + delta_weight(lr, weight), merged * magnitude / norm, rtol=1e-6, atol=1e-6
    )
    formats.save(state, tmp_path / "b.safetensors", format="kohya", layout=layout)
    same(formats.load(tmp_path / "b.safetensors", layout, merging=True), state)
    assert (
        json.loads(
            safetensors.safe_open(tmp_path / "b.safetensors", "pt").metadata()["ss_network_args"]
        )["wd_on_output"]
        == "False"
    )
    with pytest.raises(
        UserError, match=r"unet.a is a DoRA by columns, which only kohya's format holds"
    ):
        formats.save(state, tmp_path / "c.safetensors", layout=layout)


def test_a_flat_magnitude_of_a_square_layer_is_never_guessed(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(5, 5)})})
    flat = torch.rand(5)
    with pytest.raises(
        UserError,
        match=r"by the rows or columns of \[5, 5\]; "
        r'choose dora_axis="rows" .* or dora_axis="columns"',
    ):
        formats.load(dora_file(tmp_path, (5, 5), flat), layout, merging=True)

    def shape(file, **options):
        return tuple(
            formats.load(file, layout, merging=True, **options)
            .components["unet"]["a"]
            .magnitude.shape
        )

    assert shape(dora_file(tmp_path, (5, 5), flat), dora_axis="rows") == (5,)
    assert shape(dora_file(tmp_path, (5, 5), flat), dora_axis="columns") == (1, 5)
    for said, expected in (("True", (5,)), ("False", (1, 5))):
        file = dora_file(
            tmp_path, (5, 5), flat, {"ss_network_args": json.dumps({"wd_on_output": said})}
        )
        assert shape(file) == expected and shape(file, dora_axis="rows") == (5,)
    by_rows = dora_file(
        tmp_path, (5, 5), flat[:, None], {"ss_network_args": json.dumps({"wd_on_output": "False"})}
    )
    assert shape(by_rows) == (5,)  # the shape tells
    with pytest.raises(UserError, match="goes by rows, not by columns; leave the axis out"):
        shape(by_rows, dora_axis="columns")
    with pytest.raises(UserError, match="expected rows or columns"):
        shape(by_rows, dora_axis="row")
    wide = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(6, 4)})})
    for length, expected in ((4, (4,)), (6, (1, 6))):
        state = formats.load(dora_file(tmp_path, (4, 6), torch.rand(length)), wide, merging=True)
        assert tuple(state.components["unet"]["a"].magnitude.shape) == expected
    with pytest.raises(
        UserError,
        match=r"DoRA magnitude \[7\], expected one number per output, \[4\] or \[4, 1\], "
        r"or one per input, \[1, 6\]",
    ):
        formats.load(dora_file(tmp_path, (4, 6), torch.rand(7)), wide, merging=True)


def test_a_fused_layer_with_a_dora_by_columns_is_refused(flow, tmp_path):
    name, magnitude = "lora_unet_double_blocks_0_img_attn_qkv", torch.rand(1, 32)
    with pytest.raises(
        UserError,
        match=r"double_blocks.0.img_attn.qkv of transformer .* is a DoRA by columns, "
        "whose parts have other norms",
    ):
        formats.load(dora_file(tmp_path, (96, 32), magnitude, name=name), flow, merging=True)


# ---------------------------------------------------------------- what else files hold


def test_allow_extra_leaves_unknown_keys_out_and_says_so_once(pipe, layout, tmp_path, capsys):
    state = random_state(pipe, scale=1.0)
    odd = {f"unet.extra.{i}.lora_A.weight": torch.ones(1, 1) for i in range(5)}
    file = save_file(respelled(state, "A B") | odd, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError,
        match=r"has 5 unknown key\(s\): unet.extra.0.lora_A.weight, .* and 2 more; "
        r"nearest known: unet\.",
    ):
        formats.load(file, layout)
    same(formats.load(file, layout, allow_extra=True), state)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and said.startswith(f"{file} has 5 unknown key(s)")
        and said.endswith("left out\n")
    )
    with pytest.raises(UserError, match="unknown key"):  # nothing at all is known
        formats.load(save_file(odd, tmp_path / "b.safetensors"), layout, allow_extra=True)


def test_eight_bit_floats_are_read_exactly(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(6, 4)})})
    down, up = (
        (torch.randn(2, 6) * 3).to(torch.float8_e4m3fn),
        torch.randn(4, 2).to(torch.float8_e5m2),
    )
    file = save_file(
        {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    lr = formats.load(file, layout).components["unet"]["a"]
    assert (
        lr.down.dtype == torch.float16
        and torch.equal(lr.down.float(), down.float())
        and torch.equal(lr.up.float(), up.float())
    )
    save_file(
        {
            "lora_unet_a.lora_down.weight": down.to(torch.complex64),
            "lora_unet_a.lora_up.weight": up,
        },
        file,
    )
    with pytest.raises(UserError, match="complex64, expected floating point"):
        formats.load(file, layout)


def test_a_single_integer_is_an_alpha_but_no_factor(tmp_path):
    layout = layout_of({"unet": nn.ModuleDict({"a": nn.Linear(1, 1)})})
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(1, 1),
        "lora_unet_a.lora_up.weight": torch.ones(1, 1),
        "lora_unet_a.alpha": torch.tensor(3),
    }
    file = save_file(tensors, tmp_path / "a.safetensors")
    assert formats.load(file, layout).components["unet"]["a"].scale == 3
    save_file(tensors | {"lora_unet_a.lora_up.weight": torch.ones(1, 1, dtype=torch.int32)}, file)
    with pytest.raises(
        UserError, match=r"lora_up.weight in .* is torch.int32, expected floating point"
    ):
        formats.load(file, layout)


def test_hashes_are_those_that_kohya_computes(tmp_path):
    """sd-scripts hashes the bytes after a header of ss_ entries, and 64 KB from 1 MB on."""
    layout = layout_of(
        {"unet": nn.ModuleDict({f"l{i}": nn.Linear(900, 700) for i in range(9)})},
        base_model_version="v",
    )
    state = AdapterState(
        {
            "unet": {
                f"l{i}": LowRank(torch.randn(40, 900), torch.randn(700, 40).half(), 0.5)
                for i in range(9)
            }
        }
    )
    formats.save(
        state,
        tmp_path / "a.safetensors",
        format="kohya",
        layout=layout,
        metadata={"config": "x" * 999, "ss_steps": "7 ü"},
    )
    header = safetensors.safe_open(tmp_path / "a.safetensors", "pt").metadata()
    data = safetensors.torch.save(
        load_file(tmp_path / "a.safetensors"),
        {key: value for key, value in header.items() if key.startswith("ss_")},
    )
    assert header["ss_steps"] == "7 ü" and len(data) > 0x110000
    assert (
        header["sshs_model_hash"]
        == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    )
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    formats.save(
        formats.load(tmp_path / "a.safetensors", layout),
        tmp_path / "b.safetensors",
        format="diffusers",
        layout=layout,
    )
    assert (
        "sshs_model_hash" not in safetensors.safe_open(tmp_path / "b.safetensors", "pt").metadata()
    )


def test_token_rows_bundled_with_a_lora_come_along(pipe, layout, tmp_path):
    state, rows = random_state(pipe, scale=1.0), torch.randn(2, 16)
    file = save_file(
        respelled(state, "A B") | {"bundle_emb.dog.emb_params": rows}, tmp_path / "a.safetensors"
    )
    read = formats.load(file, layout)
    same(read, state)
    assert torch.equal(read.tokens["clip_l"], rows) and len(read.token_names) == 2
    alone = formats.load(
        save_file({"bundle_emb.dog.emb_params": rows}, tmp_path / "b.safetensors"), layout
    )
    assert not alone.components and torch.equal(alone.tokens["clip_l"], rows)


def test_formats_that_are_only_read_say_so(pipe, tmp_path):
    with pytest.raises(UserError, match="comfyui is only read; the nearest is"):
        formats.save(random_state(pipe), tmp_path / "a.safetensors", format="comfyui")


def test_a_layout_is_not_changed_by_reading(flow, tmp_path):
    before = replace(flow)
    formats.save(
        flow_state(flow, ["norm_out.linear"]),
        tmp_path / "a.safetensors",
        format="kohya",
        layout=flow,
    )
    formats.load(tmp_path / "a.safetensors", flow)
    assert before == flow and Path(tmp_path / "a.safetensors").exists()
