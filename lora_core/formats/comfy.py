"""ComfyUI's key names and XLabs' trainer's: read only, because kohya's format holds as much.

ComfyUI: `diffusion_model.{path in the original code}.lora_A.weight` and
`text_encoders.clip_l.transformer.{path}.lora_up.weight`, the keys of its model patches. The scale
is alpha / rank, or 1 without an alpha. ai-toolkit writes the same prefix before diffusers' paths;
both are read.
XLabs: `{block}.processor.qkv_lora1.down.weight`, without alpha. q, k and v are one layer. In single
blocks, where the original code computes the MLP's input with them, the file has q, k and v alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import joined_layers, kohya
from lora_core.formats.grammar import (
    STRICT,
    DecodeOptions,
    Grammar,
    decode_adapter,
    find_leaves,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.known_formats import XLABS_LEAVES
from lora_core.formats.layout import Component, Layout

DENOISER, ENCODER = "diffusion_model", "text_encoders.{}.transformer"
# Key of an encoder's token rows -> ComfyUI's names; clip_h is the one of 1024 inputs.
ENCODER_NAMES = {"t5": ("t5xxl",), "clip_l": ("clip_l", "clip_h")}
XLABS_NAMES = {  # end of a layer's name in the original code -> the trainer's own module
    "img_attn.qkv": "processor.qkv_lora1",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}
PARTS = 3  # q, k and v


def read_comfyui(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The adapter state of a file with ComfyUI's names.

    Raises UserError, also without a layout: the original code's names follow only from a model's
    paths.
    """
    if layout is None:
        raise UserError(
            f"{source} has ComfyUI's names, which can only be read against a model's layout; "
            "name the model it belongs to"
        )
    grammar, stored = comfyui_names(layout)
    known = list_known_keys(grammar, stored, find_leaves(tensors, source), tensors)
    found = decode_adapter(tensors, known, stored, source, options=options)
    return to_adapter_state(joined_layers.separate_layers(found, layout, source), header)


def read_xlabs(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The adapter state of a file from XLabs' trainer.

    Raises UserError, also without a layout, and for a model without such blocks.
    """
    if layout is None:
        raise UserError(
            f"{source} has the names of XLabs' trainer, which can only be read against "
            "a model's layout; name the model it belongs to"
        )
    grammar, stored = xlabs_names(layout)
    known = list_known_keys(grammar, stored, XLABS_LEAVES, tensors)
    found = decode_adapter(tensors, known, stored, source, options=options)
    apart = joined_layers.separate_layers(found, _without_mlp_inputs(layout), source)
    return to_adapter_state(apart, header)


def comfyui_names(layout: Layout) -> tuple[Grammar, Layout]:
    """The grammar of ComfyUI's names, and the layout of files."""
    stored = joined_layers.join_layout(layout)
    original = kohya.other_names(stored)

    def heads(name: str, component: Component) -> tuple[str, ...]:
        if name not in layout.encoders:
            return (DENOISER, f"model.{DENOISER}")
        key = layout.encoders[name]
        return tuple(ENCODER.format(own) for own in ENCODER_NAMES.get(key, (key,)))

    grammar = Grammar(
        heads=heads,
        names=lambda component, path: (*original.get(path, ()), path),
        leaves={},
        scale="alpha",
        magnitude=lambda out, ndim: (out,) + (1,) * (ndim - 1),
    )
    return grammar, stored


def xlabs_names(layout: Layout) -> tuple[Grammar, Layout]:
    """The grammar of XLabs' names, and the layout of files."""

    def names(component: Component, path: str) -> tuple[str, ...]:
        original = component.names.get(path, path)
        ends = [end for end in XLABS_NAMES if original.endswith("." + end)]
        return tuple(original[: -len(end)] + XLABS_NAMES[end] for end in ends)

    grammar = Grammar(
        heads=lambda name, component: ("", DENOISER),
        names=names,
        leaves={},
        scale="folded",
        magnitude=lambda out, ndim: (out,),
    )
    return grammar, joined_layers.join_layout(_without_mlp_inputs(layout))


def _without_mlp_inputs(layout: Layout) -> Layout:
    """The layout of the denoiser with q, k and v joined, without the input of an MLP."""
    narrow = {}
    for name, part in layout.components.items():
        if name not in layout.encoders:
            fused = {joined: parts[:PARTS] for joined, parts in part.fused.items()}
            narrow[name] = replace(part, fused=fused)
    return replace(layout, components=narrow)
