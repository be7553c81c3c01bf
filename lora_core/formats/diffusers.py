"""The native format: `unet.{path}.lora_A.weight`, `text_encoder.text_model.{path}.lora_B.weight`, as diffusers and peft spell it.

Every module is written in the one style that reloads exactly everywhere: a file that mixes `lora.down` with `lora_A` loses its attention layers in
diffusers 0.42.1 when a `lora_A` key comes first. The scale is multiplied into lora_B, because readers without the `lora_adapter_metadata` header
take scale 1. A DoRA magnitude is `lora_magnitude_vector`, [out], for convolutions [1, out, 1, 1]; in text encoders with `.weight` at the end,
without which transformers 5.23 drops it (a warning, then m = |W + delta W|).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lora_core.algebra import AdapterState
from lora_core.errors import UserError
from lora_core.formats.grammar import Grammar, Site, decode, encode, sites
from lora_core.formats.layout import COMPONENTS, ENCODERS, Component, Layout, missing_level

ADAPTER_HEADER = "lora_adapter_metadata"  # peft's LoraConfig fields as JSON, "unet.r" and so on
GRAMMAR = Grammar(
    leaves={
        "down": ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
        "up": ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
        "alpha": ("alpha",),
        "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    },
    separator=".",
    heads=lambda name, component: (name,),
    names=lambda component, path: path,
    scale="folded",
    magnitude=lambda out, ndim: (1, out, 1, 1) if ndim == 4 else (out,),
    written={(name, "magnitude"): "lora_magnitude_vector.weight" for name in ENCODERS},
)
FACTOR = re.compile(rf"({'|'.join(COMPONENTS)})\..+\.({'|'.join(re.escape(leaf) for role in ('down', 'up') for leaf in GRAMMAR.leaves[role])})")


def detect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a factor of this grammar."""
    return any(FACTOR.fullmatch(key) for key in tensors)


def read(tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str) -> AdapterState:
    """The file's state, shapes checked against the layout where there is one; else names are taken as they stand. Raises UserError."""
    scales = _header_scales(header, source)
    if scales and any(key.endswith(".alpha") for key in tensors):
        raise UserError(f"{source} gives its strength twice, in alpha tensors and in the header {ADAPTER_HEADER}; remove one")
    known = sites(GRAMMAR, layout) if layout else _sites(tensors)
    return AdapterState(decode(tensors, GRAMMAR, known, layout, scales=scales, source=source), metadata=dict(header))


def write(state: AdapterState, layout: Layout | None, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries. Without a layout the names in the state are taken as published."""
    return encode(state, GRAMMAR, layout or _own_layout(state)), {"format": "pt"}


def _own_layout(state: AdapterState) -> Layout:
    shapes = {name: {path: (lr.up.shape[0], *lr.down.shape[1:]) for path, lr in modules.items()} for name, modules in state.components.items()}
    return Layout("", "", {name: Component((), paths) for name, paths in shapes.items()}, {})


def _sites(keys: Iterable[str]) -> dict[str, Site]:
    """The grammar alone, for files read without a layout. A text encoder's missing `text_model.` level is put back."""
    found: dict[str, Site] = {}
    leaves = {leaf: role for role, spellings in GRAMMAR.leaves.items() for leaf in spellings}
    pattern = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+)\.({'|'.join(map(re.escape, sorted(leaves, key=len, reverse=True)))})")
    for key in keys:
        if match := pattern.fullmatch(key):
            component, path, leaf = match.groups()
            found[key] = Site(component, missing_level(component, (path,)) + path, leaves[leaf])
    return found


def _header_scales(header: Mapping[str, str], source: str) -> dict[str, float]:
    """Component -> scale from peft's header, alpha / r or alpha / sqrt(r). Raises UserError for settings that differ by layer."""
    if ADAPTER_HEADER not in header:
        return {}
    try:
        fields: dict[str, Any] = json.loads(header[ADAPTER_HEADER])
        components = [name for name in COMPONENTS if f"{name}.r" in fields]
        for name in components:
            if fields.get(f"{name}.rank_pattern") or fields.get(f"{name}.alpha_pattern"):
                raise UserError(f"{source} has {name} ranks or alphas by layer in its header {ADAPTER_HEADER}, not read; fold them into lora_B")
        power = {name: 0.5 if fields.get(f"{name}.use_rslora") else 1.0 for name in components}
        return {name: fields.get(f"{name}.lora_alpha", 8) / fields[f"{name}.r"] ** power[name] for name in components}  # 8: peft's default
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source} has a broken header {ADAPTER_HEADER} ({error}); remove or mend it") from None
