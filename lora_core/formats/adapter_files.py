"""Read and write adapter files of any format, and the adapter files of a run's folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats import joined_layers
from lora_core.formats.container import is_pickle, read_tensors, write_tensors
from lora_core.formats.grammar import DecodeOptions
from lora_core.formats.known_formats import (
    CUSTOM,
    CUSTOM_KIND,
    EMBEDDINGS,
    FORMATS,
    NATIVE,
    READABLE,
    TOKEN_FORMATS,
    TOKEN_NAMES,
    WRITABLE,
    folder_file_stem,
    import_function,
    run_file_names,
)
from lora_core.formats.layout import Layout, nearest_name
from lora_core.formats.recognition import (
    BUNDLED,
    model_of_run,
    recognize_file,
    recognize_keys,
    refuse_other_kinds,
)
from lora_core.formats.training_metadata import OUTPUT_NAME, carry_metadata, without_file_entries

TRAINED_KINDS = ("LoKr", "LoHa")  # of dense updates
HOW_TO_DISTILL = (
    "merge.py convert --as lora --model BASE makes a LoRA of it, merge.py fold puts it into a model"
)


# ---------------------------------------------------------------- reading


def load(
    path: str | Path,
    layout: Layout | None = None,
    *,
    allow_extra: bool = False,
    dora_axis: str = "",
    merging: bool = False,
    custom: bool = False,
) -> AdapterState:
    """The content of an adapter file, of a run's folder, or of an adapter folder written by peft.

    A run's folder gives its LoRA and its token rows. Nothing in a file is executed.

    allow_extra: leave out unknown keys, named in one line on stderr, instead of refusing the file.
    dora_axis: "rows" or "columns", the axis of the DoRA magnitudes in files with kohya's names
    whose shapes and header leave it open.
    merging: also read updates that no run trains, to be merged or applied: LyCORIS' full updates
    and LoHa and LoKr with a DoRA's magnitude (`AdapterState.dense`), and DoRAs by columns.
    custom: also read adapters of a class that the user wrote, as tensors (`AdapterState.custom`).

    Raises UserError for an incomplete file, NaN or Inf, and an unknown key; with a layout, also for
    shapes that do not fit it.
    """
    if dora_axis not in ("", "rows", "columns"):
        raise UserError(f"the axis of DoRA magnitudes is {dora_axis!r}, expected rows or columns")
    path = Path(path)
    options = DecodeOptions(allow_extra, dora_axis)
    files = find_adapter_files(path, custom=custom)
    merged = _load_files(files, layout, options)
    if not merging:
        _refuse_merge_only(merged, str(path))
    if merged.custom and not custom:
        raise UserError(custom_file_error(str(files[0]), merged.metadata.get(CUSTOM_KIND, "")))
    return merged


def load_mapped(
    path: str | Path,
    layout: Layout | None = None,
    *,
    allow_extra: bool = False,
    dora_axis: str = "",
) -> AdapterState:
    """The content of an adapter as `load` with `merging` reads it, one of a thousand to be merged.

    Its tensors stay on the disk until they are used. Raises UserError as `load` does.
    """
    files = find_adapter_files(Path(path), custom=False)
    state = _load_files(files, layout, DecodeOptions(allow_extra, dora_axis, mapped=True))
    if state.custom:
        raise UserError(custom_file_error(str(files[0]), state.metadata.get(CUSTOM_KIND, "")))
    return state


def detect_format(path: str | Path) -> str:
    """The name in FORMATS of the format of an adapter file, or of a folder's first file.

    "diffusers" for files that no format knows: its reader names the odd keys.
    """
    try:
        return recognize_file(path).format or "diffusers"
    except (UserError, OSError):
        return "diffusers"


def _load_files(
    files: Sequence[Path], layout: Layout | None, options: DecodeOptions
) -> AdapterState:
    states = [_load_file(file, layout, options) for file in files]
    merged = states[0]
    for file, state in zip(files[1:], states[1:], strict=True):
        merged = _join_states(merged, state, str(files[0]), str(file))
    return merged


def _load_file(path: Path, layout: Layout | None, options: DecodeOptions) -> AdapterState:
    source = str(path)
    if not is_pickle(path):
        tensors, header = read_tensors(path, mapped=options.mapped)
        return _read_tensors(tensors, header, layout, source, options)
    found = import_function("pickled_adapters", "load_pickled")(path, layout)
    if isinstance(found, AdapterState):
        return found
    return _read_tensors(found, {}, layout, source, options)


def _read_tensors(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    layout: Layout | None,
    source: str,
    options: DecodeOptions,
) -> AdapterState:
    if CUSTOM_KIND in header:
        return _read_custom(tensors, header)
    found = recognize_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    refuse_other_kinds(found, source)
    if found.kind == "unknown":
        raise UserError(_unknown_file_error(list(tensors), source))
    read = FORMATS[found.format].read
    if not [key for key in tensors if key.startswith(BUNDLED)]:
        return read(tensors, header, layout, source, options)
    split = import_function("embeddings", "split_bundled_tokens")
    rest, bundled = split(tensors, layout, source)
    if bundled and not rest:
        return bundled
    state = read(rest, header, layout, source, options)
    return _add_bundled_tokens(state, bundled, source) if bundled else state


def _read_custom(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> AdapterState:
    custom: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        custom.setdefault(component, {})[name] = tensor
    return AdapterState(metadata=dict(header), custom=custom)


def custom_file_error(source: str, kind: str) -> str:
    """What to do with a file of adapters of a user's class, whose code is not run unasked."""
    by_header = f", {kind} by its header" if kind else ""
    whole = Path(source).with_name("model")  # none of a class that no weight holds
    other = f", or take the whole model next to it, {whole}" if whole.is_dir() else ""
    return (
        f"{source} holds adapters without a low-rank form, of a class of its own{by_header}. Its "
        "code is not run unasked: name the class again, with --adapter-kind FILE.py:Class in "
        f"infer.py, merge.py fold and merge.py convert, or kind= in patch{other}"
    )


def _unknown_file_error(keys: list[str], source: str) -> str:
    if source.endswith(CUSTOM):
        return custom_file_error(source, "")
    return (
        f"{source} is not an adapter file: none of its {len(keys)} keys "
        f"({', '.join(keys[:3])} ...) is known to {', '.join(READABLE)}"
    )


def _add_bundled_tokens(state: AdapterState, rows: AdapterState, source: str) -> AdapterState:
    """The state of a file with the token rows that it bundles."""
    if state.tokens:
        raise UserError(
            f"{source} has token rows ({', '.join(state.token_names)}) as well as bundled ones "
            f"({', '.join(rows.token_names)}); expected one"
        )
    metadata = state.metadata | rows.metadata
    return replace(state, tokens=rows.tokens, token_names=rows.token_names, metadata=metadata)


def _join_states(first: AdapterState, second: AdapterState, one: str, other: str) -> AdapterState:
    """The networks of both files and the tokens of one. Of the header of a token file stays what
    does not describe that file.

    Raises UserError for a network in both, and for tokens of another training.
    """
    for name in second.changed_components:
        if name in first.changed_components:
            raise UserError(f"{one} and {other} both adapt {name}; expected one of them")
    other_metadata = second.metadata
    if first.changed_components and not second.changed_components:
        other_metadata = without_file_entries(second.metadata)
    joined = replace(
        first,
        components=first.components | second.components,
        parameters=first.parameters | second.parameters,
        dense=first.dense | second.dense,
        custom=first.custom | second.custom,
        metadata=other_metadata | first.metadata,
    )
    if second.tokens:
        token_names = import_function("embeddings", "token_names")
        trained = token_names(first.metadata, second.token_names, one)
        if trained != second.token_names:
            raise UserError(
                f"{one} was trained with the tokens {', '.join(trained)}, "
                f"{other} has {', '.join(second.token_names)}"
            )
        joined.tokens = second.tokens
        joined.token_names = second.token_names
    return joined


def _refuse_merge_only(state: AdapterState, source: str) -> None:
    for name, updates in state.dense.items():
        for path, update in updates.items():
            if update.kind in TRAINED_KINDS and update.is_whole and update.magnitude is None:
                continue
            what = _describe_dense(name, path, update)
            raise UserError(f"{source} holds updates that no run trains: {what}; {HOW_TO_DISTILL}")
    for name, modules in state.components.items():
        for path, lr in modules.items():
            if lr.magnitude is not None and lr.magnitude.ndim > 1:
                raise UserError(
                    f"{source} holds updates that no run trains: {name}.{path} is a DoRA by "
                    f"columns; {HOW_TO_DISTILL}"
                )


def _describe_dense(component: str, path: str, update: DenseUpdate) -> str:
    form = "update" if update.magnitude is None else "update with a DoRA's magnitude"
    return f"{component}.{path} is a {update.kind} {form}, not a product of two factors"


# ---------------------------------------------------------------- files of a folder


def find_adapter_files(path: Path, *, custom: bool) -> list[Path]:
    """The files to read: the one given, or those of a folder.

    A folder is peft's, has folders of peft's called like components, or is a run's: then, with
    `custom`, its adapters' own tensors come before the LoRA made of them. Raises UserError.
    """
    if not path.is_dir():
        return [path]
    return import_function("peft_settings", "find_peft_files")(path) or _find_run_files(
        path, custom=custom
    )


def _find_run_files(folder: Path, *, custom: bool) -> list[Path]:
    """The LoRA of a run's folder, if any, then its token rows, if any.

    Raises UserError when there is neither, or more than one of a kind.
    """
    files = sorted(folder.glob("[!.]*.safetensors"))  # a dot: left by a writer that was killed
    for name, older in older_file_names(folder.resolve()).items():
        if folder / name in files and folder / older in files:
            files.remove(folder / older)
    rows = [file for file in files if file.name.endswith(EMBEDDINGS)]
    loras = [file for file in files if file not in rows]
    tensors = [file for file in loras if file.name.endswith(CUSTOM)]
    for own in (NATIVE, run_file_names(folder_file_stem(folder.resolve()))[1]):
        if folder / own in loras:
            loras = [folder / own]
    if custom and tensors:
        loras = tensors
    for kind in (loras, rows):
        if len(kind) > 1:
            names = ", ".join(file.name for file in kind[:4])
            raise UserError(
                f"{folder} has {len(kind)} files to choose from ({names}); name one of them"
            )
    if not loras and not rows and (model := model_of_run(folder)):
        raise UserError(
            f"{folder} has no LoRA: its run trained the whole model, which is {model}; "
            "give that as the model"
        )
    if not loras and not rows:
        raise UserError(
            f"{folder} has no .safetensors file; expected {NATIVE} or *{EMBEDDINGS}, "
            "is the run finished?"
        )
    return loras + rows


def older_file_names(folder: Path) -> dict[str, str]:
    """The name of a file of a checkpoint -> the one that an earlier version gave it, by its step
    alone; empty for other folders.
    """
    names = run_file_names(folder_file_stem(folder)), run_file_names(folder.name)
    return {new: old for new, old in zip(*names) if old != new}


# ---------------------------------------------------------------- writing


def save(
    state: AdapterState,
    path: str | Path,
    *,
    format: str = "diffusers",
    layout: Layout | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the part of the state that the format holds: factors, or token rows, or both.

    Atomic; the same state gives the same bytes. The header has the state's metadata (without what
    described the tensors it came with), then `metadata`, the tokens' names, then the format's own,
    with a layout also what kind of file it is, its title, base, rank and alpha.
    Factors and rows are cast to `dtype` where given; magnitudes are not, because the effect of a
    DoRA is the small difference between its magnitude and the norm of the weight.

    Raises UserError when the state has nothing for this format, the layout lacks a module, or a
    number overflows `dtype`.
    """
    if format not in WRITABLE:
        what = f"there is no format {format}"
        if format in READABLE:
            what = f"{format} is only read"
        raise UserError(f"{what}; the nearest is {nearest_name(format, WRITABLE)}")
    is_token_format = format in TOKEN_FORMATS
    if not is_token_format and not FORMATS[format].holds_lycoris:
        _refuse_dense(state, f"{path}, in the format {format}, cannot be written")
    is_refused = not is_token_format and not FORMATS[format].holds_parameters
    if is_refused and any(state.parameters.values()):
        import_function("parameter_changes", "refuse_parameters")(
            state, f"{path}, in the format {format},"
        )
    if FORMATS[format].is_pickle:
        import_function(FORMATS[format].module, FORMATS[format].writer)(
            _cast_state(state, dtype or torch.float32), Path(path), layout
        )
        return
    if not (state.tokens if is_token_format else state.changed_components):
        missing = "token rows" if is_token_format else "adapted modules"
        raise UserError(f"there is nothing to write to {path}: the state has no {missing}")
    path = Path(path)
    write = FORMATS[format].write
    assert write is not None  # of a writable format
    tensors, own = write(_cast_state(state, dtype), layout, path.stem)
    given = dict(metadata or {})
    if layout and not is_token_format:
        title = given.get(OUTPUT_NAME) or state.metadata.get(OUTPUT_NAME) or path.stem
        own = _describe_file(state, format, layout, title) | own
    header = carry_metadata(state.metadata, given | own)
    if state.token_names:
        names = json.dumps(list(state.token_names), ensure_ascii=False)
        header[TOKEN_NAMES] = names
    write_tensors(path, tensors, header, hashes=not is_token_format)


def _describe_file(state: AdapterState, format: str, layout: Layout, title: str) -> dict[str, str]:
    """What kohya's header and the model spec say of a LoRA file, in any format: alphas are ranks in
    those that fold the scale into the factors.
    """
    if not FORMATS[format].stores_scales:
        components = {}
        for name, modules in state.components.items():
            components[name] = {path: lr._replace(scale=1.0) for path, lr in modules.items()}
        state = replace(state, components=components)
    described: dict[str, str] = import_function("kohya", "describe_adapter")(state, layout, title)
    return described


def _refuse_dense(state: AdapterState, what: str) -> None:
    for name, modules in state.dense.items():
        for path, update in modules.items():
            raise UserError(
                f"{what}: {_describe_dense(name, path, update)}; the format kohya holds it under "
                f"LyCORIS' names, {HOW_TO_DISTILL}"
            )


def settle_scales(state: AdapterState, format: str, layout: Layout | None) -> AdapterState:
    """The factors and scales that `save` writes of a state.

    They give the same updates, but for the rounding of factors in half precision. For kohya's
    format without a layout, which `save` refuses, the state as it is.
    """
    if FORMATS[format].stores_scales:
        return import_function("kohya", "equalize_scales")(state, layout) if layout else state
    fold_scale = import_function("grammar", "fold_scale")
    components = {}
    for name, modules in state.components.items():
        components[name] = {path: fold_scale(lr) for path, lr in modules.items()}
    return replace(state, components=components)


def save_run(
    state: AdapterState,
    folder: str | Path,
    *,
    layout: Layout,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Writes the adapter files of a finished run, as far as the state has content for them.

    They are NATIVE (diffusers' names), <run>.safetensors (kohya's names; LyCORIS' for its updates,
    which the former cannot hold) and <run>_emb.safetensors (token rows, always fp32); <run> is the
    folder's name, in RUN/checkpoints/300 RUN-000300. For a state that kohya's format cannot hold,
    that file is left out and one line printed.
    """
    folder = Path(folder).resolve()
    native, kohya, rows = (folder / name for name in run_file_names(folder_file_stem(folder)))
    written = run_file_paths(state, folder, layout)
    if native in written:
        save(state, native, format="diffusers", layout=layout, metadata=metadata, dtype=dtype)
    if kohya in written:
        save(state, kohya, format="kohya", layout=layout, metadata=metadata, dtype=dtype)
    elif native in written:
        print(
            f"{kohya.name}, the file for A1111 and ComfyUI, is not written: "
            f"{joined_layers.why_not_joined(state, layout)}",
            file=sys.stderr,
        )
    if rows in written:
        spec = import_function("model_spec", "embedding_spec")(layout, rows.stem)
        own = spec | dict(metadata or {})
        save(state, rows, format="embeddings", layout=layout, metadata=own)
    return written


def run_file_paths(state: AdapterState, folder: Path, layout: Layout) -> list[Path]:
    """The files that `save_run` writes of this state."""
    native, kohya, rows = (folder / name for name in run_file_names(folder_file_stem(folder)))
    written = []
    if any(state.dense.values()):
        written.append(kohya)
    elif any(state.components.values()):
        written.append(native)
        if not joined_layers.why_not_joined(state, layout):
            written.append(kohya)
    if state.tokens:
        written.append(rows)
    return written


def _cast_state(state: AdapterState, dtype: torch.dtype | None) -> AdapterState:
    """The state with factors and rows in `dtype`.

    A scale that is folded on writing rounds `up` a second time.
    """
    if dtype is None:
        return state
    components: dict[str, dict[str, LowRank]] = {}
    for name, modules in state.components.items():
        components[name] = {}
        for path, lr in modules.items():
            cast = LowRank(lr.down.to(dtype), lr.up.to(dtype), lr.scale, lr.magnitude)
            components[name][path] = cast
    dense: dict[str, dict[str, DenseUpdate]] = {}
    for name, updates in state.dense.items():
        dense[name] = {path: update.cast(dtype) for path, update in updates.items()}
    parameters = {}
    for name, changes in state.parameters.items():
        parameters[name] = {path: change.to(dtype) for path, change in changes.items()}
    tokens = {key: rows.to(dtype) for key, rows in state.tokens.items()}
    return replace(state, components=components, dense=dense, parameters=parameters, tokens=tokens)
