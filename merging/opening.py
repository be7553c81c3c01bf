"""Open adapter files with the layout of the model that they were made for.

Whole models are recognized here and opened in `base_models`, which imports the libraries of the
networks.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import models
from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.escaped_output import is_quick, print_note
from lora_core.formats.adapter_files import HOW_TO_DISTILL, load_mapped
from lora_core.formats.known_formats import TOKEN_FORMATS, WRITABLE
from lora_core.formats.layout import Layout
from lora_core.formats.recognition import describe_kind, recognize_file
from merging.commands import FileReadOptions, OpenOptions
from models import known
from models.published import PUBLISHED_MODELS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin", ".pth")
SPELLED_OUT = ("diffusers", "embeddings")  # formats that can be read without a layout
ARCHITECTURE = "modelspec.architecture"  # entry of a header
MOST_IN_MEMORY = 16  # files of a merge that are read at once, in half the time of mapped ones
# of formats that are only read, or only written where the output's ending asks for it
NEAREST_WRITABLE = {"comfyui": "kohya"} | dict.fromkeys(("xlabs", "peft", "mixofshow"), "diffusers")


def is_whole_model(path: str) -> bool:
    """Whether a path is a whole model, not an adapter.

    A path that does not exist and looks like NAME/NAME without a file's ending is a hub id, and so
    a model. Raises UserError for another path that does not exist, and for a damaged file.
    """
    place = Path(path)
    if place.exists() and not place.is_file() and not place.is_dir():
        raise UserError(f"{path} is neither a file nor a folder; give an adapter or a model")
    if not place.exists():
        if HUB_ID.fullmatch(path) and place.suffix not in FILE_ENDINGS:
            return True
        raise UserError(f"{path} does not exist; give a file, a folder, or a model's id on the hub")
    if place.is_file():
        return recognize_file(path).kind == "model"
    try:
        return recognize_file(path).kind == "model"
    except (UserError, OSError):
        return False  # a folder that its reader refuses with its reason


def describe_path(path: str) -> str:
    """What a path is, in words that follow "is", for errors where another kind is expected."""
    try:
        return describe_kind(recognize_file(path))
    except (UserError, OSError):
        return "no file that can be read"


def find_layout(
    paths: Sequence[str], reading: OpenOptions, *, needed: bool = False
) -> Layout | None:
    """The layout that adapters belong to; see `find_model`."""
    return find_model(paths, reading, needed=needed)[0]


def find_model(
    paths: Sequence[str], reading: OpenOptions, *, needed: bool = False
) -> tuple[Layout | None, OpenOptions]:
    """(the layout that adapters belong to, the options with the model that it is of).

    It is that of --model, else of the published model they fit, else of the folder that a header
    names. None where their keys contain the layers' paths, so that they can be read without, if it
    is not `needed`. Raises UserError for other files that fit no model.
    """
    if reading.model:
        return open_layout(reading.model, reading), reading
    reasons = []
    for path in paths:
        try:
            return known.recognize_path(path), reading
        except UserError as error:
            if formats.detect_format(path) not in SPELLED_OUT:
                reasons.append(error)
    if needed or any(isinstance(reason, known.UndecidedModel) for reason in reasons):
        from merging.header_model import find_header_model

        folder, source = find_header_model(paths)
        if folder:
            print_note(f"model {folder}, as the header of {source} says")
            reading = replace(reading, model=folder)
            return open_layout(folder, reading), reading
    if reasons:
        raise reasons[0]
    return None, reading


def needs_layout(format: str) -> bool:
    """Whether files of a format have other names than the layers' paths."""
    return format not in ("", *SPELLED_OUT, *TOKEN_FORMATS)


def open_layout(path: str, reading: FileReadOptions) -> Layout:
    """The layers of a model that can be adapted, from its configs or the keys of a single file.

    `path` may be the name of a published model, such as sdxl. No weight is read.
    """
    if path in PUBLISHED_MODELS and not Path(path).exists():
        return known.published_layout(path)
    config = reading.model_config if Path(path).is_file() else ""
    return models.read_layout(path, config)


def open_adapter(
    path: str,
    layout: Layout | None,
    reading: FileReadOptions,
    *,
    merging: bool = False,
    mapped: bool = False,
) -> AdapterState:
    """The adapter in a file or a run's folder.

    `merging` also reads updates that are not a product of two factors, as `DenseUpdate` among the
    components. `mapped` does so too and leaves tensors on the disk until they are used. Raises
    UserError for a whole model, and as `formats.load` does.
    """
    if is_whole_model(path):  # also a folder or a hub id, which `formats.load` does not know
        raise UserError(
            f"{path} is a whole model where an adapter is expected; distill makes an adapter of "
            "the difference of two models"
        )
    allow_extra, dora_axis = reading.allow_extra, reading.dora_axis
    if mapped:
        state = load_mapped(path, layout, allow_extra=allow_extra, dora_axis=dora_axis)
    else:
        state = formats.load(
            path, layout, allow_extra=allow_extra, dora_axis=dora_axis, merging=merging
        )
    if not (merging or mapped) and any(state.dense.values()):
        component, updates = next((name, own) for name, own in state.dense.items() if own)
        raise UserError(
            f"{path} holds other updates than LoRA and DoRA: {component}.{next(iter(updates))} is "
            f"no product of two factors; {HOW_TO_DISTILL}"
        )
    state.components = state.updates()  # type: ignore[assignment]
    state.dense = {}
    return state


def open_each(
    paths: Sequence[str], layout: Layout | None, reading: FileReadOptions, *, merging: bool = False
) -> list[AdapterState]:
    """The adapters in several files, which may have any layers.

    Raises UserError as `open_adapter` does, with the models' names for files of different ones.
    """
    try:
        shown = _show_progress(paths)
        mapped = merging and len(paths) > MOST_IN_MEMORY
        if mapped:
            from merging.allocator import return_large_blocks

            return_large_blocks()
        return [
            open_adapter(path, layout, reading, merging=merging, mapped=mapped) for path in shown
        ]
    except UserError as error:
        from merging.shared_model import name_families

        raise name_families(paths, error) from None


def _show_progress(paths: Sequence[str]) -> Iterator[str]:
    """The paths with a bar over the bytes of their files, if these are many."""
    sized = [(path, os.path.getsize(path) if os.path.exists(path) else 0) for path in paths]
    if is_quick(sum(size for _, size in sized)):
        return iter(paths)
    from merging.byte_progress import count_items

    return count_items(sized, sum(size for _, size in sized), "reading")


def open_adapters(
    paths: Sequence[str], layout: Layout | None, reading: FileReadOptions, *, merging: bool = False
) -> list[AdapterState]:
    """The adapters in several files of one model, as `open_adapter` reads each.

    Raises UserError with the models' names for files of different published models, also where
    their headers alone tell them apart. Without a layout, files whose layers cannot belong to one
    network are refused too.
    """
    states = open_each(paths, layout, reading, merging=merging)
    compare_headers(states, paths, reading)
    if layout is None and len(states) > 1:
        from merging.shared_model import check_one_model

        check_one_model(states, paths)
    return states


def compare_headers(
    states: Sequence[AdapterState], paths: Sequence[str], reading: FileReadOptions
) -> None:
    """Raises UserError for files whose headers are of different models, without --model."""
    architectures = {state.metadata.get(ARCHITECTURE) for state in states} - {None}
    if len(architectures) > 1 and not getattr(reading, "model", ""):
        from merging.shared_model import check_headers

        check_headers(states, paths)


def choose_output_format(paths: Sequence[str]) -> str:
    """The format for a result: that of the first file with factors.

    For a format that is only read, the one that its readers are most likely to know; for one of
    .pth files, diffusers'.
    """
    for path in paths:
        found = formats.detect_format(path)
        if found not in TOKEN_FORMATS:
            return NEAREST_WRITABLE.get(found, found if found in WRITABLE else "diffusers")
    return "diffusers"


def widest_dtype(states: Sequence[AdapterState]) -> torch.dtype | None:
    """The widest dtype of the factors in some adapters or, without any, of their token rows."""
    dtypes = {lr.down.dtype for lr in _all_factors(states)}
    for state in states:
        for changes in state.parameters.values():
            dtypes |= {change.dtype for change in changes.values()}
    if not dtypes:
        for state in states:
            dtypes |= {rows.dtype for rows in state.tokens.values()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _all_factors(states: Sequence[AdapterState]) -> Iterator[LowRank]:
    for state in states:
        for updates in state.components.values():
            yield from (lr for lr in updates.values() if isinstance(lr, LowRank))
