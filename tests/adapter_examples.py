"""Adapters, layouts and key spellings that the tests of file formats share."""

from dataclasses import replace
from functools import cache

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from safetensors.torch import save_file as save_distinct
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.formats import layout_of
from models import flux, sd, sdxl
from tests import tiny_sdxl
from tests.tiny_pipeline import random_state


def fused_layout():
    """q, k (4 outputs each) and m (8) in one layer "one.qkm", p renamed, n with swapped halves."""
    net = nn.ModuleDict(
        {
            name: nn.Linear(6, out)
            for name, out in (("q", 4), ("k", 4), ("m", 8), ("p", 6), ("n", 8))
        }
    )
    layout = layout_of({"transformer": net, "text_encoder": nn.ModuleDict({"t": nn.Linear(6, 6)})})
    part = replace(
        layout.components["transformer"],
        names={"p": "one.proj"},
        fused={"one.qkm": ("q", "k", "m")},
        swapped=frozenset({"n"}),
    )
    return replace(layout, components={**layout.components, "transformer": part})


def meta_sd15():
    """Stable Diffusion 1.5's UNet and text encoder on the meta device: shapes without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
    return unet, text


def save_good_file(tmp_path, pipe, layout, format="kohya"):
    formats.save(random_state(pipe), tmp_path / "good.safetensors", format=format, layout=layout)
    return load_file(tmp_path / "good.safetensors")


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


def save_file(tensors, path, metadata=None):
    save_distinct(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata
    )
    return path


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


@cache
def published_size_layout(name):
    """The layout of an architecture at its published size, from networks on the meta device."""
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


def dora_file(tmp_path, shape, magnitude, header=None, name="lora_unet_a"):
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, *shape[1:]),
        f"{name}.lora_up.weight": torch.randn(shape[0], 2, *[1] * (len(shape) - 2)),
    }
    return save_file(
        tensors | {f"{name}.dora_scale": magnitude}, tmp_path / "a.safetensors", header
    )
