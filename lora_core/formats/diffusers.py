"""The native format: `unet.{path}.lora_A.weight`, `text_encoder.text_model.{path}.lora_B.weight`, as diffusers and peft spell it.

Every module is written in the one style that reloads exactly everywhere: a file that mixes `lora.down` with `lora_A` loses its attention layers in
diffusers 0.42.1 when a `lora_A` key comes first. The scale is multiplied into lora_B, because readers without the `lora_adapter_metadata` header
take scale 1. A DoRA magnitude is `lora_magnitude_vector`, [out], for convolutions [1, out, 1, 1]; in text encoders with `.weight` at the end,
without which transformers 5.23 drops it (a warning, then m = |W + delta W|).
Read are all spellings that diffusers and peft have written, down to the attention processors of 2023, and strengths from alphas or that header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import peft
from lora_core.formats.grammar import (
    STRICT,
    Grammar,
    ReadOptions,
    TensorRole,
    decode_adapter,
    encode_adapter,
    find_leaves,
    is_adapter_key,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.layout import COMPONENTS, ENCODERS, Component, Layout, missing_level

GRAMMAR = Grammar(
    heads=lambda name, component: (name, f"{name}.base_model.model"),
    names=lambda component, path: (path, *peft.processor_names(path)),
    leaves={
        "down": ".lora_A.weight",
        "up": ".lora_B.weight",
        "magnitude": ".lora_magnitude_vector",
    },
    scale="folded",
    magnitude=lambda out, ndim: (1, out, 1, 1) if ndim == 4 else (out,),
    written={(name, "magnitude"): ".lora_magnitude_vector.weight" for name in ENCODERS},
)


PROCESSOR = re.compile(r"_lora\.(up|down)\.weight$|\.processor\.")


def detect_diffusers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a component's factor."""
    return any(
        key.startswith(tuple(f"{name}." for name in COMPONENTS)) and is_adapter_key(key)
        for key in tensors
    )


def read_diffusers(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str, how: ReadOptions = STRICT
) -> AdapterState:  # fmt: skip
    """The file's state, shapes checked against the layout where there is one; else names are taken as they stand. Raises UserError."""
    settings = peft.header_settings(header, source)
    if settings and any(key.endswith(".alpha") for key in tensors):
        raise UserError(
            f"{source} gives its strength twice, in alpha tensors and in the header {peft.HEADER}; remove one"
        )
    if layout is None and (old := next((key for key in tensors if PROCESSOR.search(key)), None)):
        raise UserError(
            f"{source} has names of old attention processors ({old}), which mean layers of a model's layout; name the model"
        )
    leaves = find_leaves(tensors, source)
    known = (
        list_known_keys(GRAMMAR, layout, leaves)
        if layout
        else _keys_without_layout(tensors, leaves)
    )
    found = decode_adapter(
        tensors,
        known,
        layout,
        source,
        how=how,
        scales={name: own.scale for name, own in settings.items()},
    )
    for name, own in settings.items():
        own.check(found.get(name, {}), f"{name} in {source}")
    return to_adapter_state(found, header)


def write_diffusers(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header entries. Without a layout the names in the state are taken as published."""
    return encode_adapter(state, GRAMMAR, layout or _layout_of_state(state)), {"format": "pt"}


def _layout_of_state(state: AdapterState) -> Layout:
    shapes = {
        name: {path: (lr.up.shape[0], *lr.down.shape[1:]) for path, lr in modules.items()}
        for name, modules in state.components.items()
    }
    return Layout("", "", {name: Component((), paths) for name, paths in shapes.items()}, {})


def _keys_without_layout(keys: Iterable[str], leaves: Mapping[str, str]) -> dict[str, TensorRole]:
    """The grammar alone, for files read without a layout. A text encoder's missing `text_model.` level is put back."""
    found: dict[str, TensorRole] = {}
    plain = sorted((leaf for leaf in leaves if leaf.startswith(".")), key=len, reverse=True)
    pattern = re.compile(rf"({'|'.join(COMPONENTS)})\.(.+?)({'|'.join(map(re.escape, plain))})")
    for key in keys:
        if match := pattern.fullmatch(key):
            component, path, leaf = match.groups()
            found[key] = TensorRole(
                component, missing_level(component, (path,)) + path, leaves[leaf]
            )
    return found
