"""Adapter files whose keys name no component: peft's own, and other files of a single network.

peft's are in a folder with adapter_config.json; keys are `base_model.model.{path}.lora_A.weight`.
Others are of a UNet's attention processors or of one transformer. The component is the one that has
the layers; where several do (two CLIP text encoders), the shapes decide, or the folder's name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import joined_layers, kohya
from lora_core.formats.diffusers import spell_path
from lora_core.formats.grammar import (
    STRICT,
    DecodeOptions,
    Grammar,
    TensorRole,
    Update,
    decode_adapter,
    find_leaves,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.known_formats import PEFT_MODULE
from lora_core.formats.layout import Component, Layout
from lora_core.formats.peft_settings import CONFIG, PeftSettings, folder_settings

Found = dict[str, dict[str, Update]]  # component -> path -> update


def read_peft(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The file's state, with the settings of the config next to it, if there is one.

    Raises UserError without a layout, and for paths of no component, or of several.
    """
    if layout is None:
        raise UserError(
            f"{source} does not say which network its keys ({next(iter(tensors))} ...) belong to; "
            "name the model"
        )
    settings = folder_settings(Path(source))
    grammar, stored = peft_names(layout)
    known = _keys_by_component(tensors, grammar, stored, source)
    name, found = _only_fitting(tensors, known, stored, source, options, settings)
    if settings:
        settings.check(found.get(name, {}), source)
    elif _has_no_strength(tensors):
        print(
            f"{source} has peft's names but no {CONFIG} next to it; "
            "its strength is taken as alpha = r",
            file=sys.stderr,
        )
    return to_adapter_state(joined_layers.separate_layers(found, layout, source), header)


def _has_no_strength(keys: Iterable[str]) -> bool:
    """Whether keys are peft's, which has no alphas."""
    keys = list(keys)
    is_peft = any(key.startswith(PEFT_MODULE) for key in keys)
    return is_peft and not any(key.endswith(".alpha") for key in keys)


def _keys_by_component(
    tensors: Mapping[str, Tensor], grammar: Grammar, stored: Layout, source: str
) -> dict[str, dict[str, TensorRole]]:
    """Component -> the keys of a file that holds this component."""
    leaves = find_leaves(tensors, source)
    known = {}
    for name, part in stored.components.items():
        known[name] = list_known_keys(grammar, replace(stored, components={name: part}), leaves)
    return known


def _only_fitting(
    tensors: Mapping[str, Tensor],
    known: Mapping[str, Mapping[str, TensorRole]],
    stored: Layout,
    source: str,
    options: DecodeOptions,
    settings: PeftSettings | None,
) -> tuple[str, Found]:
    """(the component that a file fits, its updates). Raises UserError for none or several."""
    counts = {name: len(own.keys() & tensors.keys()) for name, own in known.items()}
    likely = [name for name, count in counts.items() if count == max(counts.values())]
    folder = Path(source).parent.name
    if folder in likely:
        likely = [folder]
    fitting: dict[str, Found] = {}
    errors = []
    for name in likely:
        scales = {name: settings.scale} if settings else {}
        try:
            fitting[name] = decode_adapter(
                tensors, known[name], stored, source, options=options, scales=scales
            )
        except UserError as error:
            errors.append(error)
    if not fitting:
        raise errors[0]
    if len(fitting) > 1:
        raise UserError(
            f"{source} fits {' and '.join(fitting)} alike; "
            "put it into a folder called like the one it belongs to"
        )
    return next(iter(fitting.items()))


def peft_names(layout: Layout) -> tuple[Grammar, Layout]:
    """The grammar of names without a network, and the layout of files."""
    stored = joined_layers.join_layout(layout)
    original = kohya.other_names(stored)

    def names(component: Component, path: str) -> list[str]:
        return [*spell_path(component, path), *original.get(path, ())]

    grammar = Grammar(
        heads=lambda name, component: (PEFT_MODULE, ""),
        names=names,
        leaves={},
        scale="folded",
        magnitude=lambda out, ndim: (out,),
    )
    return grammar, stored
