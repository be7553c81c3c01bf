"""Adapter files. A row of FORMATS is a grammar; a `Layout` supplies the family's nouns; `AdapterState` is what is left of a file once read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats import (
    cloneofsimo,
    comfy,
    diffusers,
    embeddings,
    joined_layers,
    kohya,
    mixofshow,
    peft,
)
from lora_core.formats.container import is_pickle, read_tensors, write_tensors
from lora_core.formats.grammar import ReadOptions
from lora_core.formats.layout import COMPONENTS, Component, Layout, layout_of, nearest_name
from lora_core.formats.pickles import pickled_tensors, read_pickle

__all__ = [
    "FORMATS",
    "NATIVE",
    "Component",
    "Format",
    "Layout",
    "layout_of",
    "load",
    "run_file_names",
    "run_file_paths",
    "save",
    "save_run",
]

NATIVE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for in a folder
EMBEDDINGS = "_emb.safetensors"  # how a run's file of token rows ends
CUSTOM = "_adapter.safetensors"  # and the one of adapters of one's own kind without a low-rank form (lora_core.adapters.custom_files)
HOW_TO_DISTILL = "merge.py resize --rank R makes a LoRA of it, merge.py fold puts it into a model"


Tensors = Mapping[str, Tensor]
EncodedFile = tuple[dict[str, Tensor], dict[str, str]]


class Format(NamedTuple):
    detect: Callable[
        [Tensors], bool
    ]  # looks at keys; one matching key is enough, so that the reader can name the odd ones
    read: Callable[[Tensors, Mapping[str, str], Layout | None, str, ReadOptions], AdapterState]
    write: Callable[[AdapterState, Layout | None, str], EncodedFile] | None = None
    hashes: bool = False  # whether the header gets kohya's hashes of the file


def _strict(read: Callable[[Tensors, Mapping[str, str], Layout | None, str], AdapterState]) -> Any:
    """A reader that has no unknown keys to allow and no axes to ask for."""
    return lambda tensors, header, layout, source, how: read(tensors, header, layout, source)


FORMATS = {  # in the order in which they are tried
    "diffusers": Format(
        diffusers.detect_diffusers, diffusers.read_diffusers, diffusers.write_diffusers
    ),
    "kohya": Format(kohya.detect_kohya, kohya.read_kohya, kohya.write_kohya, hashes=True),
    "cloneofsimo": Format(
        cloneofsimo.detect_cloneofsimo,
        _strict(cloneofsimo.read_cloneofsimo),
        cloneofsimo.write_cloneofsimo,
    ),
    "xlabs": Format(comfy.detect_xlabs, comfy.read_xlabs),
    "comfyui": Format(comfy.detect_comfyui, comfy.read_comfyui),
    "peft": Format(peft.detect_peft, peft.read_peft),
    "embeddings": Format(
        embeddings.detect_embeddings,
        _strict(embeddings.read_embeddings),
        embeddings.write_embeddings,
    ),
    "a1111": Format(
        embeddings.detect_embeddings, _strict(embeddings.read_embeddings), embeddings.write_a1111
    ),
    "textual_inversion": Format(
        embeddings.detect_embeddings,
        _strict(embeddings.read_embeddings),
        embeddings.write_textual_inversion,
    ),
}
TOKEN_FORMATS = ("embeddings", "a1111", "textual_inversion")  # the formats of token rows
FOREIGN = {  # pattern of a key -> what the file is; recognised in order to be refused by name
    r".*norm\.(query|key)_norm\.(scale|lora_.*)|.*norm_added_[qk]\.lora_.*": "a control LoRA, which also changes norms and adds input channels",
    r"lora_controlnet": "a control LoRA of Stability's, which holds the parts of a ControlNet",
    r".*\.(oft_blocks|oft_diag|boft_.*|oft_r(\.weight)?)": "an OFT adapter, which turns weights and has no update of its own",
    r".*\.(a1|a2|b1|b2)\.weight|.*\.on_input": "a GLoRA or (IA)^3 adapter of LyCORIS",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a whole checkpoint",
}
STALE_HEADER = re.compile(
    r"format|lora_adapter_metadata|(ss_|sshs_|modelspec\.).*"
)  # header entries that describe the file they were read from


def load(
    path: str | Path, layout: Layout | None = None, *, allow_extra: bool = False, dora_axis: str = "", merging: bool = False
) -> AdapterState:  # fmt: skip
    """What an adapter's file holds, or a run's folder (its LoRA and the token rows beside it), or a folder of peft's. Nothing in it is executed.

    allow_extra: leave out keys that mean nothing here, said in one line on stderr, instead of refusing the file.
    dora_axis: "rows" or "columns", for the DoRA magnitudes of files in kohya's names whose shapes and header do not tell.
    merging: also read what can only be merged into a model or distilled: LyCORIS' updates (`AdapterState.dense`) and DoRAs by columns.

    Raises UserError for anything but a whole, finite file whose every key is understood; with a layout, shapes must fit it too.
    """
    if dora_axis not in ("", "rows", "columns"):
        raise UserError(f"the axis of DoRA magnitudes is {dora_axis!r}, expected rows or columns")
    path, how = Path(path), ReadOptions(allow_extra, dora_axis)
    files = _find_files(path)
    states = [_load_file(file, layout, how) for file in files]
    merged = states[0]
    for file, state in zip(files[1:], states[1:], strict=True):
        merged = _join_states(merged, state, str(files[0]), str(file))
    if not merging:
        _refuse_merge_only(merged, str(path))
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
    writers = {name: row.write for name, row in FORMATS.items() if row.write}
    if format not in writers:
        what = f"{format} is only read" if format in FORMATS else f"there is no format {format}"
        raise UserError(f"{what}; the nearest is {nearest_name(format, writers)}")
    if any(state.dense.values()):
        raise UserError(
            f"{path} cannot be written: {_describe_first_dense(state)}; {HOW_TO_DISTILL}"
        )
    if not (state.tokens if format in TOKEN_FORMATS else any(state.components.values())):
        raise UserError(
            f"there is nothing to write to {path}: the state has no {'token rows' if format in TOKEN_FORMATS else 'adapted modules'}"
        )
    path = Path(path)
    tensors, own = writers[format](_cast_state(state, dtype), layout, path.stem)
    header = (
        {key: value for key, value in state.metadata.items() if not STALE_HEADER.fullmatch(key)}
        | dict(metadata or {})
        | own
    )
    if state.token_names:
        header[embeddings.TOKEN_NAMES] = json.dumps(list(state.token_names), ensure_ascii=False)
    write_tensors(path, tensors, header, hashes=FORMATS[format].hashes)


def save_run(
    state: AdapterState,
    folder: str | Path,
    *,
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """The files a run ends with, those that the state has content for: NATIVE and <run>.safetensors (kohya's names), <run>_emb.safetensors.

    <run> is the folder's name. Token rows stay fp32. A state that kohya's names cannot hold is said in one line, and that file left out.
    """
    folder = Path(folder).resolve()
    native, kohyas, rows = (folder / name for name in run_file_names(folder.name))
    written = []
    if any(state.components.values()):
        written.append(native)
        save(state, written[0], format="diffusers", layout=layout, metadata=metadata, dtype=dtype)
        if reason := joined_layers.why_not_joined(state, layout):
            print(
                f"{folder.name}.safetensors, the file for A1111 and ComfyUI, is not written: {reason}",
                file=sys.stderr,
            )
        else:
            written.append(kohyas)
            save(state, written[1], format="kohya", layout=layout, metadata=metadata, dtype=dtype)
    if state.tokens:
        written.append(rows)
        save(state, written[-1], format="embeddings", layout=layout, metadata=metadata)
    return written


def run_file_paths(state: AdapterState, folder: Path, layout: Layout) -> list[Path]:
    """The files that `save_run` writes of this state."""
    native, kohyas, rows = (folder / name for name in run_file_names(folder.name))
    loras = (
        []
        if not any(state.components.values())
        else [native]
        if joined_layers.why_not_joined(state, layout)
        else [native, kohyas]
    )
    return loras + [rows] * bool(state.tokens)


def run_file_names(name: str) -> tuple[str, str, str]:
    """The names of the files of a run called `name`: diffusers', kohya's, token rows."""
    return NATIVE, f"{name}.safetensors", f"{name}{EMBEDDINGS}"


def _load_file(path: Path, layout: Layout | None, how: ReadOptions) -> AdapterState:
    if not is_pickle(path):
        tensors, header = read_tensors(path)
        return _read_tensors(tensors, header, layout, str(path), how)
    data = read_pickle(path)
    if cloneofsimo.is_factor_list(data):
        return cloneofsimo.read_factor_lists(path, layout)
    if mixofshow.is_mixofshow(data):
        return mixofshow.read_mixofshow(data, layout, str(path))
    if embeddings.is_pickled_embedding(data):
        return embeddings.read_pickled_embeddings(path, layout)
    return _read_tensors(pickled_tensors(data, str(path)), {}, layout, str(path), how)


def _read_tensors(
    tensors: Tensors,
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    how: ReadOptions,
) -> AdapterState:
    for pattern, what in FOREIGN.items():
        for key in tensors:
            if re.fullmatch(pattern, key):
                raise UserError(
                    f"{source} is {what} (key {key}), which is not read; the formats are {', '.join(FORMATS)}"
                )
    rest, bundled = embeddings.split_bundled_tokens(tensors, layout, source)
    if bundled and not rest:
        return bundled
    for row in FORMATS.values():
        if row.detect(rest):
            state = row.read(rest, header, layout, source, how)
            return _add_bundled_tokens(state, bundled, source) if bundled else state
    keys = list(tensors)
    if source.endswith(CUSTOM):
        model = Path(source).with_name("model")
        use = f"take the whole model beside it, {model}, or put them on again with lora_core.adapters.custom_files.load_adapters"
        raise UserError(
            f"{source} holds adapters without a low-rank form, which no LoRA can be made of; {use}"
        )
    raise UserError(
        f"{source} is no adapter file: none of its {len(keys)} keys ({', '.join(keys[:3])} ...) is known to {', '.join(FORMATS)}"
    )


def _add_bundled_tokens(state: AdapterState, rows: AdapterState, source: str) -> AdapterState:
    """The state of a file with the token rows that it bundles."""
    if state.tokens:
        raise UserError(
            f"{source} has token rows ({', '.join(state.token_names)}) beside bundled ones ({', '.join(rows.token_names)}); expected one"
        )
    return replace(
        state,
        tokens=rows.tokens,
        token_names=rows.token_names,
        metadata=state.metadata | rows.metadata,
    )


def _join_states(first: AdapterState, second: AdapterState, one: str, other: str) -> AdapterState:
    """The networks of both files and the tokens of one. Raises UserError for a network in both, and for tokens of another training."""
    for name in (*second.components, *second.dense):
        if first.components.get(name) or first.dense.get(name):
            raise UserError(f"{one} and {other} both adapt {name}; expected one of them")
    joined = replace(
        first, components=first.components | second.components, dense=first.dense | second.dense
    )
    joined.metadata = second.metadata | first.metadata
    if second.tokens:
        trained = embeddings.token_names(first.metadata, second.token_names, one)
        if trained != second.token_names:
            raise UserError(
                f"{one} was trained with the tokens {', '.join(trained)}, {other} has {', '.join(second.token_names)}"
            )
        joined.tokens, joined.token_names = second.tokens, second.token_names
    return joined


def _refuse_merge_only(state: AdapterState, source: str) -> None:
    if any(state.dense.values()):
        raise UserError(
            f"{source} cannot be put on a model as it is: {_describe_first_dense(state)}; {HOW_TO_DISTILL}"
        )
    for name, modules in state.components.items():
        for path, lr in modules.items():
            if lr.magnitude is not None and lr.magnitude.ndim > 1:
                raise UserError(
                    f"{source} cannot be put on a model as it is: {name}.{path} is a DoRA by columns; merge.py fold puts it into a model"
                )


def _describe_first_dense(state: AdapterState) -> str:
    name, path, update = next(
        (name, path, update)
        for name, modules in state.dense.items()
        for path, update in modules.items()
    )
    return f"{name}.{path} is a {update.kind} update, no product of two factors"


def _find_files(path: Path) -> list[Path]:
    """The files to read: the one given, peft's in a folder or in folders called like components, or a run's. Raises UserError."""
    if not path.is_dir():
        return [path]
    if peft.is_peft_folder(path):
        return [peft.peft_weights(path)]
    parts = [path / name for name in COMPONENTS if peft.is_peft_folder(path / name)]
    return [peft.peft_weights(part) for part in parts] or _find_run_files(path)


def _find_run_files(folder: Path) -> list[Path]:
    """The LoRA of a run's folder, if any, then its token rows, if any. Raises UserError for neither, or a choice."""
    files = sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith(".")
    )  # a dot: what a killed writer left
    rows = [file for file in files if file.name.endswith(EMBEDDINGS)]
    loras = [file for file in files if file not in rows]
    if folder / NATIVE in loras:
        loras = [folder / NATIVE]
    for kind in (loras, rows):
        if len(kind) > 1:
            raise UserError(
                f"{folder} has {len(kind)} files to choose from ({', '.join(file.name for file in kind[:4])}); name one of them"
            )
    if not loras and not rows and (folder / "model").is_dir():
        raise UserError(
            f"{folder} has no LoRA: its run trained the whole model, which is {folder / 'model'}; give that as the model"
        )
    if not loras and not rows:
        raise UserError(
            f"{folder} has no .safetensors file; expected {NATIVE} or *{EMBEDDINGS}, is the run finished?"
        )
    return loras + rows


def _cast_state(state: AdapterState, dtype: torch.dtype | None) -> AdapterState:
    """The state with factors and rows in `dtype`. A scale that is folded on writing rounds `up` a second time."""
    if dtype is None:
        return state
    components = {
        name: {
            path: lr._replace(down=lr.down.to(dtype), up=lr.up.to(dtype))
            for path, lr in modules.items()
        }
        for name, modules in state.components.items()
    }
    return replace(
        state,
        components=components,
        tokens={key: rows.to(dtype) for key, rows in state.tokens.items()},
    )
