"""ComfyUI's own names, `diffusion_model.{path in the original code}.lora_A.weight` and `text_encoders.clip_l.transformer.{path}.lora_up.weight`,
as its model patches go by; and those of XLabs' trainer, `{block}.processor.qkv_lora1.down.weight`. Only read: kohya's format says the same.

The scale is alpha / rank, without alpha 1. ai-toolkit writes the same prefix before diffusers' paths, which are read alike.
XLabs' files have no alpha; their q, k and v are fused, in single blocks without the way into the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import joined_layers, kohya
from lora_core.formats.grammar import (
    STRICT,
    Grammar,
    ReadOptions,
    decode_adapter,
    find_leaves,
    is_adapter_key,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.layout import Component, Layout

DENOISER, ENCODER = "diffusion_model", "text_encoders.{}.transformer"
ENCODER_NAMES = {
    "t5": ("t5xxl",),
    "clip_l": ("clip_l", "clip_h"),
}  # key of an encoder's token rows -> ComfyUI's names; clip_h is the one of 1024 inputs
XLABS_NAMES = {  # how a layer's name in the original code ends -> the trainer's own module
    "img_attn.qkv": "processor.qkv_lora1",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora",
    "linear2": "processor.proj_lora",
}
XLABS_KEY = re.compile(r"(.+\.)?processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight")
XLABS_LEAVES = {".down.weight": "down", ".up.weight": "up"}
PARTS = 3  # q, k and v


def detect_comfyui(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a factor of this grammar."""
    return any(
        key.startswith((f"{DENOISER}.", "text_encoders.")) and is_adapter_key(key)
        for key in tensors
    )


def read_comfyui(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str, how: ReadOptions = STRICT
) -> AdapterState:  # fmt: skip
    """The file's state. Raises UserError, also without a layout: the original code's names are known from a model's paths only."""
    if layout is None:
        raise UserError(
            f"{source} has ComfyUI's names, which can only be read against a model's layout; name the model it belongs to"
        )
    stored = joined_layers.join_layout(layout)
    known = list_known_keys(_comfyui_grammar(stored), stored, find_leaves(tensors, source))
    return to_adapter_state(
        joined_layers.separate_layers(
            decode_adapter(tensors, known, stored, source, how=how), layout, source
        ),
        header,
    )


def detect_xlabs(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a factor of XLabs' trainer."""
    return any(XLABS_KEY.fullmatch(key) for key in tensors)


def read_xlabs(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str, how: ReadOptions = STRICT
) -> AdapterState:  # fmt: skip
    """The state of a file of XLabs' trainer. Raises UserError, also without a layout, and for a model without such blocks."""
    if layout is None:
        raise UserError(
            f"{source} has the names of XLabs' trainer, which can only be read against a model's layout; name the model it belongs to"
        )
    narrow = {
        name: replace(
            part, fused={fused_name: parts[:PARTS] for fused_name, parts in part.fused.items()}
        )
        for name, part in layout.components.items()
    }
    layout = replace(
        layout,
        components={name: part for name, part in narrow.items() if name not in layout.encoders},
    )
    stored = joined_layers.join_layout(layout)
    known = list_known_keys(_xlabs_grammar(), stored, XLABS_LEAVES)
    return to_adapter_state(
        joined_layers.separate_layers(
            decode_adapter(tensors, known, stored, source, how=how), layout, source
        ),
        header,
    )


def _comfyui_grammar(layout: Layout) -> Grammar:
    original = {
        path: name
        for component in layout.components.values()
        for path, name in kohya.original_names(component).items()
    }

    def heads(name: str, component: Component) -> tuple[str, ...]:
        key = layout.encoders.get(name)
        return (
            (DENOISER,)
            if key is None
            else tuple(ENCODER.format(called) for called in ENCODER_NAMES.get(key, (key,)))
        )

    return Grammar(
        heads=heads,
        names=lambda component, path: (original.get(path, path), path),
        leaves={},
        scale="alpha",
        magnitude=lambda out, ndim: (out,) + (1,) * (ndim - 1),
    )


def _xlabs_grammar() -> Grammar:
    def names(component: Component, path: str) -> tuple[str, ...]:
        original = component.names.get(path, path)
        return tuple(
            original[: -len(end)] + short
            for end, short in XLABS_NAMES.items()
            if original.endswith("." + end)
        )

    return Grammar(
        heads=lambda name, component: ("", DENOISER),
        names=names,
        leaves={},
        scale="folded",
        magnitude=lambda out, ndim: (out,),
    )
