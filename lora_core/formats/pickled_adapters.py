"""Adapters in files of torch.save: factor lists, Mix-of-Show's, token rows or named tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.container import Shape
from lora_core.formats.embedding_pickles import is_pickled_embedding, read_pickled_embeddings
from lora_core.formats.factor_lists import is_factor_list, read_factor_lists, read_list_shapes
from lora_core.formats.layout import Layout
from lora_core.formats.mixofshow import is_mixofshow, mixofshow_shapes, read_mixofshow
from lora_core.formats.pickles import pickled_tensors, read_pickle
from lora_core.formats.recognition import RecognizedFile, recognize_keys, refuse_other_kinds

HYPERNETWORK = "a hypernetwork of A1111's, which has networks in the place of updates"


def load_pickled(path: Path, layout: Layout | None) -> AdapterState | dict[str, Tensor]:
    """The state of a file in a format of pickles, or the tensors of a state dict.

    Raises UserError for anything else.
    """
    data = read_pickle(path)
    if is_factor_list(data):
        return read_factor_lists(path, layout)
    if is_mixofshow(data):
        return read_mixofshow(data, layout, str(path))
    if is_pickled_embedding(data):
        return read_pickled_embeddings(path, layout)
    refuse_other_kinds(_recognize_tables(data), str(path))
    return pickled_tensors(data, str(path))


def recognize_pickled(path: Path) -> RecognizedFile:
    """What a file of torch.save is. Raises UserError for a damaged file."""
    data = read_pickle(path)
    if is_factor_list(data):
        return RecognizedFile("adapter", "cloneofsimo")
    if is_mixofshow(data):
        return RecognizedFile("adapter", "mixofshow")
    if is_pickled_embedding(data):
        return RecognizedFile("tokens", "embeddings")
    return _recognize_tables(data)


def read_pickled_shapes(path: Path) -> dict[str, Shape]:
    """Key -> shape of a file. Raises UserError as `load_pickled` does."""
    data = read_pickle(path)
    if is_factor_list(data):
        return read_list_shapes(path, data)
    if is_mixofshow(data):
        return mixofshow_shapes(data)
    if is_pickled_embedding(data):
        tensors = read_pickled_embeddings(path).tokens
    else:
        refuse_other_kinds(_recognize_tables(data), str(path))
        tensors = pickled_tensors(data, str(path))
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _recognize_tables(data: Any) -> RecognizedFile:
    """The kind of a dictionary of tensors, or of such dictionaries (an IP-Adapter's)."""
    found = data.get("state_dict", data) if isinstance(data, dict) else {}
    shapes: dict[str, Shape] = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        if isinstance(key, int) and isinstance(value, tuple) and "layer_structure" in found:
            return RecognizedFile("foreign", what=HYPERNETWORK, key=str(key))
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for name, tensor in parts:
            if isinstance(key, str) and isinstance(name, str) and isinstance(tensor, Tensor):
                shapes[f"{key}.{name}" if name else key] = tuple(tensor.shape)
    return recognize_keys(shapes) if shapes else RecognizedFile("unknown")
