"""Adapter files. A row of FORMATS is a grammar; a `Layout` supplies the family's nouns; `AdapterState` is what is left of a file once read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.algebra import AdapterState
from lora_core.errors import UserError
from lora_core.formats import diffusers, embeddings, fused, kohya
from lora_core.formats.container import read_tensors, write_tensors
from lora_core.formats.layout import Component, Layout, layout_of, nearest

__all__ = ["FORMATS", "NATIVE", "Component", "Format", "Layout", "layout_of", "load", "save", "save_run"]

NATIVE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
EMBEDDINGS = "_emb.safetensors"  # how a run's file of token rows ends


class Format(NamedTuple):
    detect: Callable[[Mapping[str, Tensor]], bool]  # looks at keys only; one matching key is enough, so that the reader can name the odd ones
    read: Callable[[Mapping[str, Tensor], Mapping[str, str], Layout | None, str], AdapterState]
    write: Callable[[AdapterState, Layout | None, str], tuple[dict[str, Tensor], dict[str, str]]]


FORMATS = {
    "diffusers": Format(diffusers.detect, diffusers.read, diffusers.write),
    "kohya": Format(kohya.detect, kohya.read, kohya.write),
    "embeddings": Format(embeddings.detect, embeddings.read, embeddings.write),
}
FOREIGN = {  # pattern of a key -> what the file is; recognised in order to be refused by name
    r"(unet|text_encoder):\d+:(up|down)": "a LoRA in cloneofsimo's index-keyed format",
    r"base_model\.model\..*": "a LoRA of a peft folder",
    r"(lora_|lycoris_|oft_).*\.(hada|lokr|oft|lora_mid|diff).*": "a LyCORIS adapter that is no plain LoRA",
    r"(diffusion_model|text_encoders)\..*\.lora_.*": "a LoRA in ComfyUI's own names",
    r".*\.processor\..*_lora(\d)?\..*": "a LoRA of old attention processors",
    r"emb_params|string_to_param.*": "a textual-inversion embedding without an encoder's name",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model)\..*": "a whole checkpoint",
}
STALE = re.compile(r"format|lora_adapter_metadata|(ss_|sshs_|modelspec\.).*")  # header entries that describe the file they were read from


def load(path: str | Path, layout: Layout | None = None) -> AdapterState:
    """What a .safetensors file holds, or a run's folder: its LoRA and the token rows beside it.

    Raises UserError for anything but a whole, finite file whose every key is understood; with a layout, shapes must fit it too.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path, layout)
    files = _run_files(path)
    states = [_load_file(file, layout) for file in files]
    merged = states[0]
    for state in states[1:]:
        trained = embeddings.names(merged.metadata, state.token_names, str(files[0]))
        if trained != state.token_names:
            raise UserError(f"{files[0]} was trained with the tokens {', '.join(trained)}, {files[-1]} has {', '.join(state.token_names)}")
        merged = replace(merged, tokens=state.tokens, token_names=state.token_names, metadata=state.metadata | merged.metadata)
    return merged


def save(
    state: AdapterState,
    path: str | Path,
    *,
    format: str = "diffusers",
    layout: Layout | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the part of the state that the format holds: factors, or token rows. Atomic; the same state gives the same bytes.

    The header has the state's metadata (without what described the file it came from), then `metadata`, the tokens' names, then the format's own.
    Factors and rows are cast to `dtype` where given; magnitudes are not, because a DoRA lives off the small difference to a norm.
    Raises UserError when the state has nothing for this format, the layout lacks a module, or a number overflows `dtype`.
    """
    if format not in FORMATS:
        raise UserError(f"there is no format {format}; the nearest is {nearest(format, FORMATS)}")
    if not (state.tokens if format == "embeddings" else any(state.components.values())):
        raise UserError(f"there is nothing to write to {path}: the state has no {'token rows' if format == 'embeddings' else 'adapted modules'}")
    path = Path(path)
    tensors, own = FORMATS[format].write(_cast(state, dtype), layout, path.stem)
    header = {key: value for key, value in state.metadata.items() if not STALE.fullmatch(key)} | dict(metadata or {}) | own
    if state.token_names:
        header[embeddings.NAMES] = json.dumps(list(state.token_names), ensure_ascii=False)
    write_tensors(path, tensors, header)


def save_run(
    state: AdapterState, folder: str | Path, *, layout: Layout, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
) -> list[Path]:
    """The files a run ends with, those that the state has content for: NATIVE and <run>.safetensors (kohya's names), <run>_emb.safetensors.

    <run> is the folder's name. Token rows stay fp32. A state that kohya's names cannot hold is said in one line, and that file left out.
    """
    folder = Path(folder).resolve()
    written = []
    if any(state.components.values()):
        written.append(folder / NATIVE)
        save(state, written[0], format="diffusers", layout=layout, metadata=metadata, dtype=dtype)
        if reason := fused.obstacle(state, layout):
            print(f"{folder.name}.safetensors, the file for A1111 and ComfyUI, is not written: {reason}", file=sys.stderr)
        else:
            written.append(folder / f"{folder.name}.safetensors")
            save(state, written[1], format="kohya", layout=layout, metadata=metadata, dtype=dtype)
    if state.tokens:
        written.append(folder / f"{folder.name}{EMBEDDINGS}")
        save(state, written[-1], format="embeddings", layout=layout, metadata=metadata)
    return written


def _load_file(path: Path, layout: Layout | None) -> AdapterState:
    tensors, header = read_tensors(path)
    for pattern, what in FOREIGN.items():
        for key in tensors:
            if re.fullmatch(pattern, key):
                raise UserError(f"{path} is {what} (key {key}), which is not read; the formats are {', '.join(FORMATS)}")
    for row in FORMATS.values():
        if row.detect(tensors):
            return row.read(tensors, header, layout, str(path))
    keys = list(tensors)
    raise UserError(f"{path} is no adapter file: none of its {len(keys)} keys ({', '.join(keys[:3])} ...) is known to {', '.join(FORMATS)}")


def _run_files(folder: Path) -> list[Path]:
    """The LoRA of a run's folder, if any, then its token rows, if any. Raises UserError for neither, or a choice."""
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))  # a dot: what a killed writer left
    rows = [file for file in files if file.name.endswith(EMBEDDINGS)]
    loras = [file for file in files if file not in rows]
    if folder / NATIVE in loras:
        loras = [folder / NATIVE]
    for kind in (loras, rows):
        if len(kind) > 1:
            raise UserError(f"{folder} has {len(kind)} files to choose from ({', '.join(file.name for file in kind[:4])}); name one of them")
    if not loras and not rows:
        raise UserError(f"{folder} has no .safetensors file; expected {NATIVE} or *{EMBEDDINGS}, is the run finished?")
    return loras + rows


def _cast(state: AdapterState, dtype: torch.dtype | None) -> AdapterState:
    """The state with factors and rows in `dtype`. A scale that is folded on writing rounds `up` a second time."""
    if dtype is None:
        return state
    components = {
        name: {path: lr._replace(down=lr.down.to(dtype), up=lr.up.to(dtype)) for path, lr in modules.items()}
        for name, modules in state.components.items()
    }
    return replace(state, components=components, tokens={key: rows.to(dtype) for key, rows in state.tokens.items()})
