"""kohya's sd-scripts format, which A1111 and ComfyUI read.

Keys are `lora_unet_{path_with_underscores}.lora_down.weight`, `.lora_up.weight`, `.alpha`. The
scale is alpha / rank; a module without alpha has scale 1 in every reader. Files are written with
one alpha for all modules, except where layers are joined: these files have the original code's
names, and each module has its own rank and alpha (see `joined_layers`). From such files diffusers
0.42.1 reads only the modules of the blocks and silently drops the others (embedders, final layer);
give it the native file, `pytorch_lora_weights.safetensors`.

A DoRA magnitude is LyCORIS' `dora_scale` by rows, [out, 1 (, 1, 1)], over the row norm of
W + delta W. Other readers differ (see `dora_readers`), and diffusers 0.42.1 leaves dora_scale out
with a warning; give it the native file.

Also read: a magnitude by columns, [1, in (, 1, 1)] (older LyCORIS); a text encoder's names under
its numbered prefix (lora_te1, as diffusers exports it) and without the text_model level; a UNet's
under the original code's names or ours; and the prefixes of OneTrainer and SimpleTuner.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats import compvis, joined_layers
from lora_core.formats.grammar import (
    STRICT,
    DecodeOptions,
    Grammar,
    decode_adapter,
    encode_adapter,
    find_leaves,
    list_known_keys,
    scale_factors,
    to_adapter_state,
)
from lora_core.formats.layout import Component, Layout
from lora_core.formats.training_metadata import SPEC_VERSION

GRAMMAR = Grammar(
    heads=lambda name, component: component.prefixes,
    names=lambda component, path: (component.names.get(path, path), path),
    leaves={
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "alpha": ".alpha",
        "magnitude": ".dora_scale",
        "w_norm": ".w_norm",
        "b_norm": ".b_norm",
        "diff_b": ".diff_b",
    },
    separator="_",
    scale="alpha",
    magnitude=lambda out, ndim: (out,) + (1,) * (ndim - 1),
    columns=True,
)
UNET_PATH = re.compile(r"down_blocks\.")
# OneTrainer counts text encoders; kohya's lora_te3 is the third network of its kind.
OTHER_PREFIXES = {"t5": ("lora_te2",)}


def read_kohya(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions = STRICT,
) -> AdapterState:
    """The adapter state of a file with kohya's names.

    Raises UserError, also without a layout: only a model's paths determine which underscores were
    dots.
    """
    if layout is None:
        raise UserError(
            f"{source} has kohya's names, which can only be read against a model's layout; "
            "name the model it belongs to"
        )
    options = replace(options, header_axis=_header_axis(header))
    grammar, stored = kohya_names(layout)
    known = list_known_keys(grammar, stored, find_leaves(tensors, source), tensors)
    found = decode_adapter(tensors, known, stored, source, options=options)
    return to_adapter_state(joined_layers.separate_layers(found, layout, source), header)


def original_names(component: Component) -> Mapping[str, str]:
    """Published path -> the dotted name in the original code.

    Empty for a network that the original code does not have.
    """
    is_unet = any(map(UNET_PATH.match, component.shapes))
    if component.names or not is_unet:
        return component.names
    names = compvis.unet_module_names(component.modules)
    one_to_one = len(set(names.values())) == len(component.modules)
    return names if one_to_one else {}  # a block that the original code does not have


def other_names(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Path -> its names in the original code, which are read in every format.

    A part of a joined layer is `qkv.0`, `qkv.1` ..., as OneTrainer numbers them.
    """
    names: dict[str, tuple[str, ...]] = {}
    for component in layout.components.values():
        for path, name in original_names(component).items():
            names[path] = (name,)
        for joined, parts in component.fused.items():
            for i, path in enumerate(parts):
                names[path] = (*names.get(path, ()), f"{joined}.{i}")
    return names


def kohya_names(layout: Layout) -> tuple[Grammar, Layout]:
    """The grammar with the names and prefixes that are only read, and the layout of files."""
    stored = joined_layers.join_layout(layout)
    original = other_names(stored)
    counted = "clip_g" not in layout.encoders.values()

    def heads(name: str, component: Component) -> tuple[str, ...]:
        if name not in layout.encoders:
            return (*component.prefixes, f"lora_{name}", "lycoris")
        others = OTHER_PREFIXES.get(layout.encoders[name], ()) if counted else ()
        return (*component.prefixes, *others)

    def names(component: Component, path: str) -> tuple[str, ...]:
        written = component.names.get(path, path)
        return (written, path, *original.get(path, ()))

    return replace(GRAMMAR, heads=heads, names=names), stored


def _header_axis(header: Mapping[str, str]) -> str:
    """ "rows" or "columns" by LyCORIS' arguments in the header; "" without them."""
    try:
        args = json.loads(header.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return ""
    on_output = str(args.get("wd_on_output", "")).lower() if isinstance(args, dict) else ""
    return {"true": "rows", "false": "columns"}.get(on_output, "")


def write_kohya(
    state: AdapterState, layout: Layout | None, title: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and kohya's header entries.

    Raises UserError without a layout, and for a DoRA of a part of a joined layer.
    """
    if layout is None:
        raise UserError(
            "writing kohya's names needs a model's layout; add --model FOLDER, the model that the "
            "adapter belongs to"
        )
    joined = joined_layers.join_layers(equalize_scales(state, layout), layout)
    tensors = encode_adapter(joined, GRAMMAR, joined_layers.join_layout(layout))
    return tensors, describe_adapter(joined, layout, title)


def equalize_scales(state: AdapterState, layout: Layout) -> AdapterState:
    """The same updates with the scales that files have: one alpha, or one scale a joined layer."""
    if any(component.fused for component in layout.components.values()):
        return joined_layers.equalize_parts(state, layout)
    return _equalize_alpha(state)


def _equalize_alpha(state: AdapterState) -> AdapterState:
    """The state with scale * rank equal in all modules, and the same updates.

    The most frequent alpha is kept, and other modules' factors are rescaled to match. diffusers
    0.42.1 does not find alphas of attention layers that differ from the rest, and uses the most
    frequent one for them.
    """
    alphas = Counter([lr.scale * lr.down.shape[0] for lr in _all_factors(state)])
    if len(alphas) < 2:
        return state
    alphas.pop(0.0, None)
    alpha = alphas.most_common(1)[0][0]
    components: dict[str, dict[str, LowRank]] = {}
    for name, modules in state.components.items():
        components[name] = {}
        for path, lr in modules.items():
            rank = lr.rank
            factor = lr.scale * rank / alpha
            own = lr if factor == 1 else scale_factors(lr, factor)
            components[name][path] = own._replace(scale=alpha / rank)
    return replace(state, components=components)


def _all_factors(state: AdapterState) -> list[LowRank]:
    factors: list[LowRank] = []
    for modules in state.components.values():
        factors += modules.values()
    return factors


def describe_adapter(state: AdapterState, layout: Layout, title: str) -> dict[str, str]:
    """The six entries kohya keeps even in its shortest header, the title, and the model spec's.

    "Dynamic" is kohya's word for mixed ranks or alphas, and for none.
    """
    factors = _all_factors(state)
    ranks = [lr.down.shape[0] for lr in factors]  # lr.rank, without a call for each layer
    alphas = {lr.scale * rank for lr, rank in zip(factors, ranks)}
    if any(state.dense.values()):
        return _lycoris_header(state, layout, title)
    magnitudes = [lr.magnitude for lr in factors if lr.magnitude is not None]
    on_output = {"False" if magnitude.ndim > 1 else "True" for magnitude in magnitudes}
    args = {}
    if magnitudes:
        args = {"algo": "lora", "dora_wd": "True"}
        if len(on_output) == 1:
            args["wd_on_output"] = on_output.pop()
    module = "lycoris.kohya" if magnitudes else layout.network_module
    return _make_header(module, ranks, alphas, args, layout, title)


def _lycoris_header(state: AdapterState, layout: Layout, title: str) -> dict[str, str]:
    """`describe_adapter` of a state with LyCORIS' updates; `algo` is the first one's."""
    dense: list[DenseUpdate] = []
    for modules in state.dense.values():
        dense += modules.values()
    ranks = [update.rank for update in dense if update.rank]
    alphas = {update.scale * update.rank for update in dense if update.rank}
    for lr in _all_factors(state):
        ranks.append(lr.rank)
        alphas.add(lr.scale * lr.rank)
    args = {"algo": dense[0].kind.lower()}
    magnitudes = [update.magnitude for update in dense if update.magnitude is not None]
    if magnitudes:
        args |= {"dora_wd": "True", "wd_on_output": str(magnitudes[0].ndim == 1)}
    return _make_header("lycoris.kohya", ranks, alphas, args, layout, title)


def _make_header(
    module: str,
    ranks: Sequence[int],
    alphas: Collection[float],
    args: Mapping[str, str],
    layout: Layout,
    title: str,
) -> dict[str, str]:
    header = {
        "ss_v2": str("_v2" in layout.base_model_version),
        "ss_base_model_version": layout.base_model_version,
        "ss_network_module": module,
        "ss_network_dim": str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic",
        "ss_network_alpha": str(next(iter(alphas))) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": json.dumps(args),
        "ss_output_name": title,
    }
    return header | adapter_spec(layout, title)


def adapter_spec(layout: Layout, title: str) -> dict[str, str]:
    """The entries of Stability's model spec (formats.model_spec) that a LoRA file has to have."""
    entries = {"modelspec.sai_model_spec": SPEC_VERSION, "modelspec.title": title}
    if layout.architecture:
        entries["modelspec.architecture"] = layout.architecture
        entries["modelspec.implementation"] = layout.implementation
    return entries
