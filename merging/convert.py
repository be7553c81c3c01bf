"""merge.py convert: the same adapter in another format, or a model as a folder or a single file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate
from lora_core.errors import UserError
from lora_core.formats.joined_layers import why_not_joined
from lora_core.formats.known_formats import FORMATS, TOKEN_FORMATS
from lora_core.formats.layout import Layout
from merging.adapter_sums import Term, layers_by_key
from merging.commands import Convert, KeepOptions, MergeMethod, OpenOptions
from merging.dense_layers import keep_dense_layers
from merging.dora_warning import warn_of_dora_readers
from merging.expression import WeightedFile
from merging.factor_sums import frobenius_norm
from merging.mix import dense_options, merge_terms
from merging.opening import find_model, is_whole_model, needs_layout, open_adapter, widest_dtype
from merging.output import (
    ADAPTER_ENDINGS,
    Output,
    check_adapter_output,
    check_output,
    make_output,
    print_written,
    report_table,
    round_adapter,
    settle_format,
    store_scales,
    write_adapter,
)
from merging.stored_layers import stored_layers
from merging.truncation import ApproximationReport

AS_LORA = "--as lora --model BASE makes a plain LoRA of it, fold puts it into a model"


def run_convert(options: Convert) -> None:
    """Writes an adapter in the format --to, or a model in the form of the output's name; several
    into a folder.
    """
    if options.others:
        convert_each(options)
        return
    output = make_output("convert", options, [options.file])
    is_model = is_whole_model(options.file)
    _refuse_idle(options, is_model)
    if is_model:
        from merging.model_sums import write_model_sum  # imports the networks' libraries

        write_model_sum([WeightedFile(1.0, options.file)], output, options.files)
        return
    output = replace(output, format=options.to)
    check_adapter_output(output)
    layout, state, reading = _open_file(options)
    output = output.with_model(reading.model)
    if options.as_:
        keep = KeepOptions(options.keep.rank, options.keep.max_error, options.keep.energy)
        method = MergeMethod(svd=options.svd.svd, seed=options.svd.seed)
        convert_to_lora(options.file, (layout, state), output, reading, keep, method)
    else:
        convert_adapter((layout, state), output, reading)


def convert_each(options: Convert) -> None:
    """Writes every file into the folder --out, in the order of the words, under its own name.

    Raises UserError before any work for names that would be the same, and that exist (without
    --overwrite); after the others for files that could not be converted, whose reasons
    were printed in their turn.
    """
    paths = (options.file, *options.others)
    folder = Path(options.out)
    if folder.suffix in ADAPTER_ENDINGS or folder.is_file():
        raise UserError(f"--out {folder} is a file, and {len(paths)} files need a folder")
    outputs: dict[Path, str] = {}
    for path in paths:
        out = folder / converted_name(path, options.to)
        if out in outputs:
            raise UserError(
                f"{outputs[out]} and {path} would both be {out}; convert one of them by itself"
            )
        outputs[out] = path
        given = Output(str(out), options.files.overwrite, options.files.dry_run)
        check_output(given, folder=not out.suffix)
    failed = []
    for number, (out, path) in enumerate(outputs.items(), start=1):
        print(f"[{number}/{len(outputs)}] {path}")
        try:
            run_convert(replace(options, file=path, others=(), out=str(out)))
        except UserError as error:
            print(f"not converted: {str(error).removeprefix(path).lstrip()}")  # named above
            failed.append(path)
    if failed:
        count = f"{len(failed)} of {len(outputs)} files could not be converted"
        raise UserError(f"{count}; see above")


def converted_name(path: str, to: str) -> str:
    """The name of a converted file: that of the file or folder, with the first ending of the format
    `to` where the format has another one. Raises UserError for a path that does not exist.
    """
    place = Path(os.path.abspath(path))  # a link keeps its name
    try:
        if is_whole_model(path):
            return place.name
    except UserError:
        if not place.exists():
            raise
        # a damaged file, whose conversion fails in its turn
    stem = place.name if place.is_dir() else place.stem
    endings = FORMATS[to or "diffusers"].endings
    return stem + (place.suffix if place.is_file() and place.suffix in endings else endings[0])


def _open_file(options: Convert) -> tuple[Layout | None, AdapterState, OpenOptions]:
    """(the layout of the file, the adapter in it, that of a user's class with --adapter-kind, how
    it was read).
    """
    if not options.adapter_kind:
        needed = needs_layout(options.to) or bool(options.as_)
        layout, reading = find_model([options.file], options.files, needed=needed)
        return layout, open_adapter(options.file, layout, reading, merging=True), reading
    from merging import base_models, custom_updates  # import the networks' libraries

    if not options.files.model:
        raise UserError(
            f"--adapter-kind {options.adapter_kind} computes its updates from the weights of the "
            "model that it was trained on; name it with --model"
        )
    base = base_models.open_base_model(options.files.model, options.files)
    if not custom_updates.is_custom(options.file, base):
        raise UserError(
            f"--adapter-kind {options.adapter_kind} has no effect: {options.file} has no adapters "
            "of a class of its own; leave it out"
        )
    kind = options.adapter_kind
    state = custom_updates.open_updates(options.file, base, options.files, kind)
    return base.layout, state, options.files


def _refuse_idle(options: Convert, is_model: bool) -> None:
    """Raises UserError for an option that has no effect."""
    if is_model and options.adapter_kind:
        raise UserError(
            f"{options.file} is a whole model, on which --adapter-kind {options.adapter_kind} has "
            "no effect; leave it out"
        )
    if is_model and (options.to or options.as_):
        flag = f"--to {options.to}" if options.to else f"--as {options.as_}"
        raise UserError(
            f"{options.file} is a whole model, whose format follows from the output's ending; "
            f"drop {flag}"
        )
    flags = options.keep.given_flags()
    for name, value in vars(options.svd).items():
        if value != getattr(type(options.svd), name):
            flags.append(f"--{name}")
    if flags and not options.as_:
        raise UserError(
            f"{flags[0]} has no effect on convert without --as lora; resize changes the rank of a "
            "LoRA"
        )


def convert_adapter(
    opened: tuple[Layout | None, AdapterState], output: Output, reading: OpenOptions
) -> None:
    """Writes the same adapter in another format; only the dtype of factors may change.

    Raises UserError for updates that the format cannot hold.
    """
    layout, state = opened
    has_layers = bool(state.changed_components)
    output = settle_format(output, layers=has_layers, tokens=bool(state.tokens))
    _refuse_unheld(state, output, layout)
    warn_of_dora_readers(state, output, reading)
    stored = stored_layers(output.format, layout)
    state, dense_reports = keep_dense_layers(state, stored, output.dtype)
    reports = {}
    for component, adapters in state.components.items():
        for name, lr in adapters.items():
            size = frobenius_norm(lr._replace(magnitude=None))
            report = ApproximationReport(lr.rank, lr.rank, size, 0.0)
            adapters[name], reports[component, name] = round_adapter(lr, report, output.dtype)
    state, reports = store_scales(state, reports, output, layout)
    joined = stored.join_reports(reports, state) | dense_reports
    table = report_table(joined) if joined else ""
    written = write_adapter(state, output, layout)
    if table and output.format not in TOKEN_FORMATS:
        print(table)
    print_written(written, output)


def convert_to_lora(
    path: str,
    opened: tuple[Layout | None, AdapterState],
    output: Output,
    reading: OpenOptions,
    keep: KeepOptions,
    method: MergeMethod,
) -> None:
    """Writes the updates of DoRAs, and of LyCORIS, as the nearest plain LoRA.

    Without a criterion every layer gets the file's largest rank. Raises UserError for a plain LoRA.
    """
    layout, state = opened
    if not state.changed_components:
        raise UserError(f"{path} holds token rows only, which are no update; leave --as lora out")
    output = settle_format(output, layers=True, tokens=bool(state.tokens))
    layers = layers_by_key(state).values()
    is_dense = any(isinstance(lr, DenseUpdate) for lr in layers)
    if not is_dense and all(lr.magnitude is None for lr in layers):
        raise UserError(f"{path} has no DoRA and is a plain LoRA already; leave --as lora out")
    if is_dense and not keep:
        raise UserError(
            f"{path} has updates of LyCORIS or of a class of its own, which have no rank of their "
            "own; choose --rank or --max-error"
        )
    keep = keep or KeepOptions(rank=max(lr.rank for lr in layers))
    terms = [Term(state)]
    dense = dense_options(terms, reading, method, keep)
    stored = stored_layers(output.format, layout)
    dtype = output.dtype or widest_dtype([state])
    found, reports, _ = merge_terms(terms, keep, method, dtype, dense, stored)
    state = replace(state, components=found.components)
    state, reports = store_scales(state, reports, output, layout)
    written = write_adapter(state, output, layout)
    print(report_table(reports))
    print_written(written, output)


def _refuse_unheld(state: AdapterState, output: Output, layout: Layout | None) -> None:
    """Raises UserError for an update that the output's format cannot hold."""
    start = f"{output.path} cannot be written under {output.format}'s names:"
    for (component, path), lr in layers_by_key(state).items():
        name = f"{component}.{path}"
        if isinstance(lr, DenseUpdate):
            if FORMATS[output.format].holds_lycoris:
                continue
            raise UserError(
                f"{start} {name} is a {lr.kind} update, not a product of two factors (--to kohya "
                f"keeps it); {AS_LORA}"
            )
        if lr.magnitude is not None and lr.magnitude.ndim > 1 and output.format != "kohya":
            raise UserError(
                f"{start} {name} is a DoRA by columns, which only kohya's format holds (--to "
                f"kohya); {AS_LORA}"
            )
    stored = stored_layers(output.format, layout)
    reason = why_not_joined(state, stored.layout) if stored.layout else ""
    if reason:
        raise UserError(f"{start} {reason}; {AS_LORA}")
