"""Whether adapter files are for one model; the names of the models where they are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.layout import Layout, Shape
from merging.adapter_sums import layers_by_key
from models import known
from models.published import PUBLISHED_MODELS

# numbers of layers that have the same shapes in every network of these kinds
REPEATED = re.compile(r"(?<=\b)(attentions|\w*transformer_blocks|layers|block)\.\d+(?=\.)")
BLOCK_NUMBER = re.compile(r"^(down|up)_blocks\.(\d+)")
CROSS_ATTENTION = re.compile(r".*\.attn2\.to_[kv]")
DENOISERS = ("unet", "transformer")


def check_one_model(states: Sequence[AdapterState], paths: Sequence[str]) -> None:
    """Raises UserError for files whose layers cannot belong to one network.

    A model has one denoiser, its repeated layers have equal shapes, and all cross-attentions of a
    UNet read text of one width. Each file is compared with the places of all earlier ones.
    """
    denoisers: dict[str, str] = {}  # its name -> the first file that adapts it
    places: dict[str, tuple[str, Shape, str]] = {}  # place -> layer, shape, first file that has it
    for path, state in zip(paths, states):
        own = _denoiser_of(state)
        if own and own not in denoisers and denoisers:
            other, first = next(iter(denoisers.items()))
            reason = f"the denoiser is a {other} in one and a {own} in the other"
            raise _different_models(first, path, reason)
        if own:
            denoisers.setdefault(own, path)
        for place, (name, shape) in _shapes_by_place(state).items():
            layer, known, first = places.setdefault(place, (name, shape, path))
            if known != shape:
                also = "" if name == layer else f"{name} is "
                reason = f"{layer} is {_spell(known)} in one and {also}{_spell(shape)} in the other"
                raise _different_models(first, path, reason)


def check_headers(states: Sequence[AdapterState], paths: Sequence[str]) -> None:
    """Raises UserError for files whose headers name the architectures of different published
    models: some have layers of the same names and shapes, as Stable Diffusion 3 and 3.5 medium.
    """
    titles: dict[str, str] = {}  # of the original model -> its first file
    for path, state in zip(paths, states):
        title = _architecture_title(state.metadata.get("modelspec.architecture", ""))
        if title:
            titles.setdefault(title, path)
    if len(titles) > 1:
        named = [f"{path} is for {title}" for title, path in titles.items()]
        raise UserError(f"{' and '.join(named)}, by their headers; give files of one model")


def _architecture_title(architecture: str) -> str:
    """The name of the original published model with an architecture; "" for an unknown one."""
    for kind, row in PUBLISHED_MODELS.items():
        if known.published_layout(kind).architecture == architecture:
            return PUBLISHED_MODELS[row.like or kind].title
    return ""


def _different_models(first: str, second: str, reason: str) -> UserError:
    return UserError(
        f"{first} and {second} are for different models: {reason}; merge files of one model"
    )


def name_families(paths: Sequence[str], error: UserError) -> UserError:
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
    return UserError(f"{' and '.join(named)}; give files of one model")


def _model_title(layout: Layout) -> str:
    """The name of a published model, that of the original for its variants."""
    for kind, row in PUBLISHED_MODELS.items():
        if known.published_layout(kind) is layout:
            return PUBLISHED_MODELS[row.like or kind].title
    return layout.family


def _denoiser_of(state: AdapterState) -> str:
    return next((name for name in DENOISERS if state.components.get(name)), "")


def _shapes_by_place(state: AdapterState) -> Mapping[str, tuple[str, Shape]]:
    """Place in a network -> (layer, its weight's shape), one place for all repeated layers."""
    shapes: dict[str, tuple[str, Shape]] = {}
    for (component, path), lr in layers_by_key(state).items():
        if not isinstance(lr, LowRank):
            continue
        shape = (lr.up.shape[0], *lr.down.shape[1:])
        shapes.setdefault(f"{component}.{_place_of(path)}", (f"{component}.{path}", shape))
        if component == "unet" and CROSS_ATTENTION.fullmatch(path):
            text = "the text that cross-attention reads"
            shapes.setdefault(text, (text, shape[1:2]))
    return shapes


def _place_of(path: str) -> str:
    """The path with * for the numbers of repeated layers; blocks of a UNet keep theirs."""
    head = BLOCK_NUMBER.match(path)
    start = head.end() if head else 0
    return path[:start] + REPEATED.sub(r"\1.*", path[start:])


def _spell(shape: Sequence[int]) -> str:
    return f"{' x '.join(map(str, shape))}" if len(shape) > 1 else f"{shape[0]} wide"
