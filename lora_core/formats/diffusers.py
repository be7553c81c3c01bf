"""The native format: `unet.{path}.lora_A.weight`, as diffusers and peft spell it.

Text encoders have `text_encoder.text_model.{path}.lora_B.weight`. Every module is written in the
one style that reloads exactly everywhere: a file that mixes `lora.down` with `lora_A` loses its
attention layers in diffusers 0.42.1 when a `lora_A` key comes first. The scale is multiplied into
lora_B, because readers take scale 1 where the header has no `lora_adapter_metadata`. A DoRA
magnitude is `lora_magnitude_vector`, [out], for convolutions [1, out, 1, 1]. In text encoders the
key ends in `.weight`: without that ending transformers 5.23 drops the magnitude with a warning, and
the layer acts as a plain LoRA.

All spellings that diffusers and peft have ever written are read, including the attention processors
of 2023; the scale comes from alphas or from that header entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import joined_layers, kohya
from lora_core.formats.grammar import (
    STRICT,
    DecodeOptions,
    Grammar,
    TensorRole,
    decode_adapter,
    encode_adapter,
    find_leaves,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.known_formats import COMPONENTS, PEFT_HEADER, PEFT_MODULE, import_function
from lora_core.formats.layout import ENCODERS, Component, Layout, missing_level

# End of a projection's path -> its names in attention processors, with and without that level.
PROCESSORS = {
    "to_q": ("processor.to_q", "to_q"),
    "to_k": ("processor.to_k", "to_k"),
    "to_v": ("processor.to_v", "to_v"),
    "to_out.0": ("processor.to_out", "to_out"),
    "self_attn.q_proj": ("self_attn.to_q",),
    "self_attn.k_proj": ("self_attn.to_k",),
    "self_attn.v_proj": ("self_attn.to_v",),
    "self_attn.out_proj": ("self_attn.to_out",),
}
PROCESSOR_ENDS = tuple(PROCESSORS)
PROCESSOR_KEY = re.compile(r"_lora\.(up|down)\.weight$|\.processor\.")


def spell_path(component: Component, path: str) -> list[str]:
    """The path, then the names under which files of attention processors have the layer."""
    found = [path]
    if not path.endswith(PROCESSOR_ENDS):
        return found
    for end, names in PROCESSORS.items():
        if path == end or path.endswith("." + end):
            found += [path[: -len(end)] + name for name in names]
    return found


GRAMMAR = Grammar(
    heads=lambda name, component: (name, f"{name}.{PEFT_MODULE}", f"{PEFT_MODULE}.{name}"),
    names=spell_path,
    leaves={
        "down": ".lora_A.weight",
        "up": ".lora_B.weight",
        "magnitude": ".lora_magnitude_vector",
    },
    scale="folded",
    magnitude=lambda out, ndim: (1, out, 1, 1) if ndim == 4 else (out,),
    written={(name, "magnitude"): ".lora_magnitude_vector.weight" for name in ENCODERS},
)


def read_diffusers(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The file's state. Raises UserError.

    Shapes are checked against the layout; without one, names are taken as they are in the file.
    """
    settings: Mapping[str, Any] = {}  # component -> PeftSettings
    if PEFT_HEADER in header:
        settings = import_function("peft_settings", "header_settings")(header, source)
    if settings and any(key.endswith(".alpha") for key in tensors):
        raise UserError(
            f"{source} gives its strength twice, in alpha tensors and in the header "
            f"{PEFT_HEADER}; remove one"
        )
    old = next(filter(PROCESSOR_KEY.search, tensors), None)
    if layout is None and old:
        raise UserError(
            f"{source} has names of old attention processors ({old}), "
            "which mean layers of a model's layout; name the model"
        )
    leaves = find_leaves(tensors, source)
    stored = None
    if layout is None:
        known = _keys_without_layout(tensors, leaves)
    else:
        grammar, stored = diffusers_names(layout)
        known = list_known_keys(grammar, stored, leaves, tensors)
    scales = {name: own.scale for name, own in settings.items()}
    found = decode_adapter(tensors, known, stored, source, options=options, scales=scales)
    if layout is not None:
        found = joined_layers.separate_layers(found, _with_original_swaps(layout), source)
    for name, own in settings.items():
        own.check(found.get(name, {}), f"{name} in {source}")
    return to_adapter_state(found, header)


def diffusers_names(layout: Layout) -> tuple[Grammar, Layout]:
    """The grammar with the original code's names, which are only read, and the layout of files.

    OneTrainer writes `transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight`.
    """
    stored = joined_layers.join_layout(_with_original_swaps(layout))
    original = kohya.other_names(stored)

    def names(component: Component, path: str) -> list[str]:
        return [*spell_path(component, path), *original.get(path, ())]

    return replace(GRAMMAR, names=names), stored


def _with_original_swaps(layout: Layout) -> Layout:
    """The layout with halves swapped under the original code's names only, not under our own."""
    components = {}
    for name, part in layout.components.items():
        components[name] = replace(part, swapped=part.swapped.intersection(part.names))
    return replace(layout, components=components)


def write_diffusers(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries.

    Without a layout the names in the state are taken as published.
    """
    return encode_adapter(state, GRAMMAR, layout or _layout_of_state(state)), {"format": "pt"}


def _layout_of_state(state: AdapterState) -> Layout:
    components = {}
    for name, modules in state.components.items():
        shapes = {path: (lr.up.shape[0], *lr.down.shape[1:]) for path, lr in modules.items()}
        components[name] = Component((), shapes)
    return Layout("", "", components, {})


def _keys_without_layout(keys: Iterable[str], leaves: Mapping[str, str]) -> dict[str, TensorRole]:
    """The roles of keys by the grammar alone.

    A text encoder's missing `text_model.` level is put back.
    """
    found: dict[str, TensorRole] = {}
    plain = sorted((leaf for leaf in leaves if leaf.startswith(".")), key=len, reverse=True)
    ends = "|".join(map(re.escape, plain))
    wrapper = rf"(?:{re.escape(PEFT_MODULE)}\.)?"
    networks = "|".join(COMPONENTS)
    pattern = re.compile(rf"{wrapper}({networks})\.{wrapper}(.+?)({ends})")
    for key in keys:
        if match := pattern.fullmatch(key):
            component, path, leaf = match.groups()
            level = missing_level(component, (path,))
            found[key] = (component, level + path, leaves[leaf])
    return found
