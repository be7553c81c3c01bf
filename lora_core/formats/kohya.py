"""kohya's sd-scripts format, which A1111 and ComfyUI read: `lora_unet_{path_with_underscores}.lora_down.weight`, `.lora_up.weight`, `.alpha`.

The scale is alpha / rank; a module without alpha has scale 1 in every reader. Files are written with one alpha for all modules, except where layers
are fused: these files have the original code's names and an alpha of their own in every module (see `fused`). Of those, diffusers 0.42.1 reads the
modules of the blocks only and drops the others (embedders, final layer) without a word; give it the native file.
A DoRA magnitude is LyCORIS' `dora_scale` by rows, [out, 1 (, 1, 1)], over the row norm of W + delta W. Other readers differ: ComfyUI divides by
the norm of W, A1111 by columns, and diffusers 0.42.1 leaves dora_scale out with a warning; give it the native file.
Read, too: a magnitude by columns, [1, in (, 1, 1)] (older LyCORIS), a text encoder's names under its numbered prefix (lora_te1, as diffusers exports
it) and without the text_model level, a UNet's under the original code's names or ours, and the prefixes of OneTrainer and SimpleTuner.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import compvis, joined_layers
from lora_core.formats.grammar import (
    STRICT,
    Grammar,
    ReadOptions,
    decode_adapter,
    encode_adapter,
    find_leaves,
    is_adapter_key,
    list_known_keys,
    to_adapter_state,
)
from lora_core.formats.layout import Component, Layout

GRAMMAR = Grammar(
    heads=lambda name, component: component.prefixes,
    names=lambda component, path: (component.names.get(path, path), path),
    leaves={
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "alpha": ".alpha",
        "magnitude": ".dora_scale",
    },
    separator="_",
    scale="alpha",
    magnitude=lambda out, ndim: (out,) + (1,) * (ndim - 1),
    columns=True,
)
OTHERS = {
    "t5": ("lora_te2",)
}  # OneTrainer counts text encoders; kohya's lora_te3 is the third network of its kind


def detect_kohya(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any key is a factor of this grammar."""
    return any(key.startswith(("lora_", "lycoris_")) and is_adapter_key(key) for key in tensors)


def read_kohya(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], layout: Layout | None, source: str, how: ReadOptions = STRICT
) -> AdapterState:  # fmt: skip
    """The file's state. Raises UserError, also without a layout: which underscores were dots is known from a model's paths only."""
    if layout is None:
        raise UserError(
            f"{source} has kohya's names, which can only be read against a model's layout; name the model it belongs to"
        )
    stored, how = joined_layers.join_layout(layout), replace(how, header_axis=_header_axis(header))
    known = list_known_keys(_reading_grammar(stored), stored, find_leaves(tensors, source))
    return to_adapter_state(
        joined_layers.separate_layers(
            decode_adapter(tensors, known, stored, source, how=how), layout, source
        ),
        header,
    )


def original_names(component: Component) -> Mapping[str, str]:
    """Published path -> the dotted name in the original code; none for a network that does not come from there."""
    if component.names or not any(path.startswith("down_blocks.") for path in component.shapes):
        return component.names
    try:
        entries = compvis.name_unet(
            {f"{path}.weight": shape for path, shape in component.shapes.items()}
        )
    except UserError:  # a block that the original code does not have
        return {}
    return {
        entry.keys[0].removesuffix(".weight"): key.removesuffix(".weight")
        for key, entry in entries.items()
    }


def _reading_grammar(layout: Layout) -> Grammar:
    """The grammar with the names and prefixes that are only read."""
    original = {
        path: name
        for component in layout.components.values()
        for path, name in original_names(component).items()
    }
    others = {
        name: OTHERS.get(key, ())
        for name, key in layout.encoders.items()
        if "clip_g" not in layout.encoders.values()
    }

    def heads(name: str, component: Component) -> tuple[str, ...]:
        further = others.get(name, ()) if name in layout.encoders else (f"lora_{name}", "lycoris")
        return (*component.prefixes, *further)

    return replace(
        GRAMMAR,
        heads=heads,
        names=lambda component, path: (
            *GRAMMAR.names(component, path),
            *filter(None, [original.get(path)]),
        ),
    )


def _header_axis(header: Mapping[str, str]) -> str:
    """What LyCORIS' arguments in the header say of magnitudes; "" where they do not."""
    try:
        args = json.loads(header.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return ""
    said = str(args.get("wd_on_output", "")).lower() if isinstance(args, dict) else ""
    return {"true": "rows", "false": "columns"}.get(said, "")


def write_kohya(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and kohya's header entries. Raises UserError without a layout, and for a DoRA of a part of a fused layer."""
    if layout is None:
        raise UserError(
            "writing kohya's names needs a model's layout; name the model the adapter belongs to"
        )
    if not any(component.fused for component in layout.components.values()):
        state = _equalize_alpha(state)
    return encode_adapter(
        joined_layers.join_layers(state, layout), GRAMMAR, joined_layers.join_layout(layout)
    ), _kohya_header(state, layout, title)


def _equalize_alpha(state: AdapterState) -> AdapterState:
    """The same update with scale * rank equal in all modules: the most frequent alpha stays, other modules' `up` takes up the difference.

    diffusers 0.42.1 does not find the alphas of attention layers that differ from the rest and takes the most frequent one for them.
    """
    counts = Counter(
        lr.scale * lr.rank
        for modules in state.components.values()
        for lr in modules.values()
        if lr.scale
    )
    if not counts:
        return state
    alpha = counts.most_common(1)[0][0]

    def moved(lr: LowRank) -> LowRank:
        factor = lr.scale * lr.rank / alpha
        up = (
            lr.up
            if factor == 1
            else (lr.up.to(torch.promote_types(lr.up.dtype, torch.float32)) * factor).to(
                lr.up.dtype
            )
        )
        return lr._replace(up=up, scale=alpha / lr.rank)

    return replace(
        state,
        components={
            name: {path: moved(lr) for path, lr in modules.items()}
            for name, modules in state.components.items()
        },
    )


def _kohya_header(state: AdapterState, layout: Layout, title: str) -> dict[str, str]:
    """The six entries kohya keeps even in its shortest header, the output's name, and the model spec's. "Dynamic" is kohya's word for mixed ones."""
    factors = [lr for modules in state.components.values() for lr in modules.values()]
    ranks, alphas = {lr.rank for lr in factors}, {lr.scale * lr.rank for lr in factors}
    axes = {
        "False" if lr.magnitude.ndim > 1 else "True" for lr in factors if lr.magnitude is not None
    }
    dora = {"algo": "lora", "dora_wd": "True"} | (
        {"wd_on_output": next(iter(axes))} if len(axes) == 1 else {}
    )
    header = {
        "ss_v2": str("_v2" in layout.base_model_version),
        "ss_base_model_version": layout.base_model_version,
        "ss_network_module": "lycoris.kohya" if axes else layout.network_module,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps(dora if axes else {}),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
    }
    return header | ({"modelspec.architecture": layout.architecture} if layout.architecture else {})
