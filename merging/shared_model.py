"""Open several adapter files of one model; files of different models are refused by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from merging.adapter_sums import layers_by_key
from merging.commands import OpenOptions
from merging.opening import open_adapter
from models import known
from models.published import PUBLISHED_MODELS

# numbers of layers that have the same shapes in every network of these kinds
REPEATED = re.compile(r"(?<=\b)(attentions|\w*transformer_blocks|layers|block)\.\d+(?=\.)")
BLOCK_NUMBER = re.compile(r"^(down|up)_blocks\.(\d+)")
CROSS_ATTENTION = re.compile(r".*\.attn2\.to_[kv]")
DENOISERS = ("unet", "transformer")


def open_adapters(
    paths: Sequence[str], layout: Layout | None, reading: OpenOptions, *, merging: bool = False
) -> list[AdapterState]:
    """The adapters in several files of one model, as `open_adapter` reads each.

    Raises UserError with the models' names for files of different published models. Without a
    layout, files whose layers cannot belong to one network are refused too.
    """
    try:
        states = [open_adapter(path, layout, reading, merging=merging) for path in paths]
    except UserError as error:
        raise _name_families(paths, error) from None
    if layout is None:
        for (first, one), (second, other) in itertools.combinations(zip(paths, states), 2):
            if reason := why_not_one_model(one, other):
                raise UserError(
                    f"{first} and {second} are for different models: {reason}; merge files of one "
                    "model"
                )
    return states


def why_not_one_model(first: AdapterState, second: AdapterState) -> str:
    """How the layers of two adapters contradict each other; "" where one model may have both.

    A model has one denoiser, its repeated layers have equal shapes, and all cross-attentions of a
    UNet read text of one width.
    """
    one, other = _denoiser_of(first), _denoiser_of(second)
    if one and other and one != other:
        return f"the denoiser is a {one} in one and a {other} in the other"
    own, others = _shapes_by_place(first), _shapes_by_place(second)
    for place, shape in own.items():
        theirs = others.get(place, shape)
        if theirs != shape:
            return f"{place} is {_spell(shape)} in one and {_spell(theirs)} in the other"
    return ""


def _name_families(paths: Sequence[str], error: UserError) -> UserError:
    """The error of opening files, with the models' names where they are different ones."""
    titles: dict[str, str] = {}
    for path in paths:
        try:
            layout = known.recognize_path(path)
        except (UserError, OSError):
            continue
        titles.setdefault(_model_title(layout), path)
    if len(titles) < 2:
        return error
    named = [f"{path} is for {title}" for title, path in titles.items()]
    return UserError(f"{' and '.join(named)}; merge files of one model")


def _model_title(layout: Layout) -> str:
    """The name of a published model, that of the original for its variants."""
    for kind, row in PUBLISHED_MODELS.items():
        if known.published_layout(kind) is layout:
            return PUBLISHED_MODELS[row.like or kind].title
    return layout.family


def _denoiser_of(state: AdapterState) -> str:
    return next((name for name in DENOISERS if state.components.get(name)), "")


def _shapes_by_place(state: AdapterState) -> Mapping[str, tuple[int, ...]]:
    """Place in a network -> the weight's shape there, one place for all repeated layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for (component, path), lr in layers_by_key(state).items():
        if not isinstance(lr, LowRank):
            continue
        shape = (lr.up.shape[0], *lr.down.shape[1:])
        shapes.setdefault(f"{component}.{_place_of(path)}", shape)
        if component == "unet" and CROSS_ATTENTION.fullmatch(path):
            shapes.setdefault("the text that cross-attention reads", shape[1:2])
    return shapes


def _place_of(path: str) -> str:
    """The path with * for the numbers of repeated layers; blocks of a UNet keep theirs."""
    head = BLOCK_NUMBER.match(path)
    start = head.end() if head else 0
    return path[:start] + REPEATED.sub(r"\1.*", path[start:])


def _spell(shape: Sequence[int]) -> str:
    return f"{' x '.join(map(str, shape))}" if len(shape) > 1 else f"{shape[0]} wide"
