"""merge.py mix: the weighted sum of adapter files, or of whole models with adapters on top."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.escaped_output import hides_progress, print_note
from lora_core.formats.known_formats import TOKEN_FORMATS
from lora_core.formats.layout import Layout
from lora_core.formats.training_metadata import join_metadata
from merging import adapter_sums
from merging.adapter_sums import (
    DenseOptions,
    LayerFactor,
    LayerKey,
    MergedLayer,
    Term,
    every_layer,
    has_magnitude,
    weighted_layers,
)
from merging.commands import (
    BUDGET,
    DENSITY_METHODS,
    UNITS,
    KeepOptions,
    MergeMethod,
    Mix,
    OpenOptions,
)
from merging.expression import WeightedFile, parse_files, shorten_sum
from merging.factor_sums import WeightedAdapters, one_thread
from merging.opening import (
    choose_output_format,
    find_model,
    is_whole_model,
    needs_layout,
    open_adapters,
    widest_dtype,
)
from merging.output import (
    MOST_NOTES,
    Output,
    align_columns,
    check_adapter_output,
    make_output,
    print_file_count,
    print_notes,
    print_warning,
    print_written,
    report_table,
    round_adapter,
    settle_format,
    store_scales,
    write_adapter,
)
from merging.stored_layers import OWN_LAYERS, StoredLayers, stored_layers
from merging.truncation import ApproximationReport, Keep
from models.published import PUBLISHED_MODELS

MANY_LAYERS = 4000  # of all files; sums of fewer take seconds

if TYPE_CHECKING:
    from merging.survival import SurvivalTally

TO_KEEP = "with --rank, --max-error or --energy"
LARGE_SUM = 1 << 28  # bytes of input files from which on the size of their exact sum is printed
METHOD_DEFAULTS = vars(MergeMethod())


def run_mix(options: Mix) -> None:
    """Writes the sum of adapters, or of models. Raises UserError, also for idle options."""
    files = parse_files(options.sum, options.out)
    if not options.out:
        raise UserError("no output; name a file with --out")
    print_file_count(files)
    output = make_output("mix", options, [file.path for file in files])
    has_model = any(is_whole_model(file.path) for file in files)
    _refuse_idle(options, has_model)
    if not has_model:
        mix_adapters(files, output, options.files, keep=options.keep, method=options.merge)
        return
    if options.keep or options.merge.method != "sum":
        raise UserError(
            f"{shorten_sum(files)} has a whole model in it, which has no rank to choose and no "
            "--method but sum; drop these options"
        )
    from merging.model_sums import FoldOptions, write_model_sum  # imports the networks' libraries

    write_model_sum(files, output, options.files, FoldOptions(options.residual))


def mix_adapters(
    files: Sequence[WeightedFile],
    output: Output,
    reading: OpenOptions,
    *,
    keep: KeepOptions,
    method: MergeMethod,
) -> None:
    """Writes the sum of adapter files. Raises UserError before anything is written."""
    check_adapter_output(output)
    paths = [file.path for file in files]
    layout, reading = find_model(paths, reading, needed=needs_layout(output.format))
    output = output.with_model(reading.model)
    merged, notes = _merge_files(files, layout, output, reading, keep, method)
    state = merged.state
    output = settle_format(
        output,
        layers=bool(state.changed_components),
        tokens=bool(state.tokens),
        default=choose_output_format(paths),
    )
    if output.format == "kohya" and has_magnitude(state):
        from merging.dora_warning import warn_of_dora_readers

        warn_of_dora_readers(state, output, reading)
    print_notes(notes, files)
    state, reports = store_scales(state, merged.reports, output, layout)
    written = write_adapter(state, output, layout)  # first: a reader may end before the table
    if reports and output.format not in TOKEN_FORMATS:
        print(report_table(reports))
        if merged.shares:
            _print_shares(files, merged.shares)
    print_written(written, output)


def _merge_files(
    files: Sequence[WeightedFile],
    layout: Layout | None,
    output: Output,
    reading: OpenOptions,
    keep: KeepOptions,
    method: MergeMethod,
) -> tuple[Merge, list[str]]:
    """(the sum, notes about its header and tokens).

    A separate function, so that the inputs' memory is free when the sum is written.
    """
    states = open_adapters([file.path for file in files], layout, reading, merging=True)
    if not any(state.changed_components for state in states):
        _refuse_idle_on_tokens(keep, method)
    terms = []
    for file, state in zip(files, states):
        terms.append(Term(state, file.weight, layer_factor(file, state, layout)))
    dtype = output.dtype
    if keep and dtype is None:  # a truncated sum is not written wider than its inputs
        dtype = widest_dtype(states)
    dense = dense_options(terms, reading, method, keep)
    if method.method == "sum" and not keep and _is_large(files):
        dense = replace(dense, kept_at=_announce_size(terms, dtype, output))
    paths, weights = [file.path for file in files], [file.weight for file in files]
    written = replace(output, format=output.format or choose_output_format(paths))
    stored = stored_layers(written.format, layout)
    merged = merge_terms(terms, keep, method, dtype, dense, stored)
    state = merged.state
    state.metadata, notes = join_metadata(states, paths)
    notes += output_order(state, states, paths, written, layout)
    if not any(own.tokens or own.metadata for own in states):
        return merged, notes
    from merging.token_names import describe_missing_tokens, describe_whole_rows, join_tokens

    notes += describe_missing_tokens(states, paths)
    joined, renamed = join_tokens(states, paths)
    state.tokens, state.token_names = joined.tokens, joined.token_names
    state.metadata |= joined.metadata
    return merged, notes + renamed + describe_whole_rows(states, paths, weights)


def _is_large(files: Sequence[WeightedFile]) -> bool:
    """Whether the size of an exact sum is worth a look: it has many files, or large ones."""
    return len(files) > MOST_NOTES or sum(os.path.getsize(file.path) for file in files) > LARGE_SUM


def _announce_size(terms: Sequence[Term], dtype: torch.dtype | None, output: Output) -> str:
    """Prints how large the result gets; returns the output's path if it is kept on the disk."""
    from merging import large_results

    print_note(large_results.describe_size(terms, dtype, output.path))
    size, _, _ = large_results.exact_size(terms, dtype)
    return output.path if size >= large_results.LARGE else ""


def _print_shares(files: Sequence[WeightedFile], shares: Sequence[float]) -> None:
    """How much of each input is left, with a warning for one of which much is lost."""
    from merging.survival import FAITHFUL

    places = sorted(range(len(files)), key=lambda place: shares[place])
    listed = list(range(len(files)))
    if len(files) > MOST_NOTES:
        listed = places[:MOST_NOTES]
        print(f"the {MOST_NOTES} of {len(files):,} inputs of which the least is kept:")
    rows = [("of each input", "kept")]
    for place in listed:
        file = files[place]
        rows.append((f"{file.weight:g}*{file.path}", f"{100 * shares[place]:.4f} %"))
    print("\n".join(align_columns(rows)))
    lost = [place for place in places if shares[place] < FAITHFUL]
    if len(lost) > MOST_NOTES:
        print_warning(
            f"less than {100 * FAITHFUL:g} % is left of {len(lost):,} of {len(files):,} files in "
            f"the result, of {files[lost[0]].path} only {100 * shares[lost[0]]:.1f} %; it keeps "
            "the strongest directions of the sum; keep more, or use fewer files"
        )
        return
    for place in sorted(lost):
        print_warning(
            f"only {100 * shares[place]:.1f} % of {files[place].path} is left in the result, which "
            "keeps the strongest directions of the sum; keep more, or give it a larger weight"
        )


def output_order(
    merged: AdapterState,
    states: Sequence[AdapterState],
    paths: Sequence[str],
    output: Output,
    layout: Layout | None,
) -> list[str]:
    """Puts the layers into the order of the inputs where the output numbers them; returns notes."""
    is_numbered = output.format == "cloneofsimo" or output.path.endswith(".pt")
    if layout is None or not is_numbered:
        return []
    from merging.layer_order import keep_layer_order

    return keep_layer_order(merged, states, paths, layout)


def layer_factor(file: WeightedFile, state: AdapterState, layout: Layout | None) -> LayerFactor:
    """The factor of each layer of a file in a sum, by the choices after its name."""
    if not file.choices:
        return every_layer
    from merging.layer_choice import choose_layers

    return choose_layers(file, state, layout)


def _refuse_idle(options: Mix, has_model: bool) -> None:
    """Raises UserError for an option that has no effect on this sum."""
    method = options.merge
    idle = {
        "--residual": bool(options.residual) and not has_model,
        "--format": bool(options.files.format) and has_model,
        "--density": method.density != MergeMethod().density
        and method.method not in DENSITY_METHODS,
    }
    target = "a sum of models" if has_model else f"{method.method} of adapters"
    for flag, is_idle in idle.items():
        if is_idle:
            raise UserError(f"{flag} has no effect on {target}; leave it out")


def _refuse_idle_on_tokens(keep: KeepOptions, method: MergeMethod) -> None:
    """Raises UserError for an option of layers where all files hold token rows only."""
    flags = keep.given_flags()
    flags += [f"--{name}" for name, value in vars(method).items() if value != METHOD_DEFAULTS[name]]
    if flags:
        raise UserError(
            f"leave out {' and '.join(flags)}: these files hold learned tokens only, which have no "
            "rank and are not scaled"
        )


# ---------------------------------------------------------------- methods


class Merge(NamedTuple):
    """The result of a merge, and what it lost."""

    state: AdapterState
    reports: dict[LayerKey, ApproximationReport]
    shares: list[float]  # of each input's energy that is kept; none where nothing is lost


def merge_terms(
    terms: Sequence[Term],
    keep: KeepOptions,
    method: MergeMethod,
    dtype: torch.dtype | None,
    dense: DenseOptions,
    stored: StoredLayers = OWN_LAYERS,
) -> Merge:
    """The merge as one record, in the output's dtype, with its reports by stored layer."""
    changes = _merge_parameters(terms, method)
    tally = None
    with one_thread():
        layers = _merge_layers(terms, keep, method, dtype, dense, stored)
        if not hides_progress() or sum(map(count_layers, terms)) >= MANY_LAYERS:
            from merging.byte_progress import show_merged_layers

            layers = show_merged_layers(layers, terms, stored, f"{method.method} of {len(terms)}")
        if dtype is not None or keep:
            from merging.survival import SurvivalTally

            tally = SurvivalTally(len(terms))
            layers = _round_layers(layers, dtype, tally)
        if dense.kept_at:
            from merging.large_results import keep_on_disk

            layers = keep_on_disk(layers, dense.kept_at)
        state, reports = adapter_sums.collect_layers(layers)
        state = stored.separate_layers(state)
    state.parameters = changes
    return Merge(state, reports, tally.shares() if tally else [])


def count_layers(term: Term) -> int:
    """The layers of a file."""
    state = term.state
    return sum(map(len, state.components.values())) + sum(map(len, state.dense.values()))


def _merge_parameters(terms: Sequence[Term], method: MergeMethod) -> dict[str, dict[str, Tensor]]:
    """The sums of the changes of norms and biases, of which most files have none."""
    if not any(term.state.parameters for term in terms):
        return {}
    if method.method != "sum":
        raise UserError(
            f"--method {method.method} is of layers, and these files also change norms and biases "
            "(w_norm, b_norm, diff_b); add them up, without --method"
        )
    from merging.parameter_sums import sum_parameters

    return sum_parameters(terms)


def dense_options(
    terms: Sequence[Term], reading: OpenOptions, method: MergeMethod, keep: KeepOptions
) -> DenseOptions:
    """How dense updates are merged: with the weights of --model where there is a DoRA.

    Raises UserError for a DoRA without them.
    """
    has_dora = any(has_magnitude(term.state) for term in terms)
    sketch = method.seed if method.svd == "randomized" and keep.rank is not None else None
    if not has_dora or _is_copy(terms, keep):
        return DenseOptions(sketch=sketch)
    if not reading.model:
        raise UserError(
            "the update of a DoRA depends on the weights of the base model; name it with --model, "
            "or fold the files into it"
        )
    if reading.model in PUBLISHED_MODELS and not Path(reading.model).exists():
        raise UserError(
            f"--model {reading.model} is the name of a model's layers, without weights; the update "
            "of a DoRA depends on them: give the model's folder, file or hub id"
        )
    # imports the networks' libraries
    from merging.base_models import base_weight_reader, open_base_model

    return DenseOptions(base_weight_reader(open_base_model(reading.model, reading)), sketch)


def _is_copy(terms: Sequence[Term], keep: KeepOptions) -> bool:
    """Whether a sum is one file as it is, or some of its layers."""
    return len(terms) == 1 and terms[0].weight == 1 and not keep


def _merge_layers(
    terms: Sequence[Term],
    keep: KeepOptions,
    method: MergeMethod,
    dtype: torch.dtype | None,
    dense: DenseOptions,
    stored: StoredLayers,
) -> Iterator[MergedLayer]:
    """The layers of a merge, one by one. Raises UserError for options that do not go together."""
    joins_doras = method.method == "sum" and not _is_copy(terms, keep)
    apart = _dense_layers(terms, stored, joins_doras=joins_doras)
    criterion = keep.per_layer()
    others: Iterable[MergedLayer] = ()
    if apart:
        from merging.dense_layers import sum_dense_layers

        is_sum = method.method == "sum" and not keep.budget
        others = sum_dense_layers(apart, terms, criterion, dense, stored, dtype, is_sum=is_sum)
    if method.method == "sum":
        factors = [term._replace(factor=_excluding(term.factor, apart)) for term in terms]
        terms = adapter_sums.join_terms(factors if apart else terms, stored)
        wanted = _ranks_or_share(keep, terms, dtype)
        sums = adapter_sums.mix_layers(terms, wanted, dense, rounded=dtype is not None)
        return itertools.chain(sums, others)
    if keep.budget:
        raise UserError(
            f"--budget is for --method sum; {method.method} takes --rank, --max-error or --energy"
        )
    if method.method == "slerp":
        return _slerp_layers(terms, criterion, stored)
    if criterion is None:
        raise UserError(
            f"{method.method} gives updates of full rank; choose how much to keep {TO_KEEP}"
        )
    from merging.ties_dare import MERGES

    merge, density = MERGES[method.method], method.density
    return adapter_sums.mix_layers_dense(
        terms, merge, criterion, density=density, seed=method.seed, dense=dense, stored=stored
    )


def _ranks_or_share(
    keep: KeepOptions, terms: Sequence[Term], dtype: torch.dtype | None
) -> Keep | Mapping[LayerKey, int] | None:
    """The rank of each layer for a budget, by the largest singular values; else one criterion."""
    if not keep.budget:
        return keep.per_layer()
    from merging.rank_budget import allot_ranks, rank_steps

    number, unit = BUDGET.fullmatch(keep.budget).groups()  # type: ignore[union-attr]
    steps = rank_steps(terms)
    if not unit:
        return allot_ranks(steps, total=round(float(number)))
    size = (dtype or torch.float32).itemsize
    total = int(float(number) * UNITS[unit.lower()] / size)
    return allot_ranks(steps, total=total, unit="parameters")


def _dense_layers(
    terms: Sequence[Term], stored: StoredLayers, *, joins_doras: bool
) -> dict[LayerKey, WeightedAdapters]:
    """Our layers whose sum is only known as a dense update.

    Those are the parts of stored layers for which a file holds an update that is not a product of
    two factors, and with `joins_doras` a DoRA of a part of a joined layer.
    """
    layers = weighted_layers(terms)
    found: dict[LayerKey, WeightedAdapters] = {}
    for key, parts in stored.group_parts(layers).items():
        is_dense = has_dora = False
        for part in parts:
            for _, update in layers[part]:
                is_dense = is_dense or isinstance(update, DenseUpdate)
                has_dora = has_dora or update.magnitude is not None
        if is_dense or (joins_doras and has_dora and stored.holds(key, parts)):
            found |= {part: layers[part] for part in parts}
    return found


def _excluding(factor: LayerFactor, keys: Collection[LayerKey]) -> LayerFactor:
    return lambda component, path: 0.0 if (component, path) in keys else factor(component, path)


def _slerp_layers(
    terms: Sequence[Term], criterion: Keep | None, stored: StoredLayers
) -> Iterator[MergedLayer]:
    """Spherical interpolation of two files, at the weight of the second."""
    weights = [term.weight for term in terms]
    is_whole = all(term.factor is every_layer for term in terms)
    is_convex = min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6
    if len(terms) != 2 or not is_whole or not is_convex:
        shown = " and ".join(f"{weight:g}" for weight in weights)
        raise UserError(
            "slerp takes two whole files whose weights add up to 1, such as 0.7*a + 0.3*b; got "
            f"{len(terms)} with {shown}"
        )
    first, second = terms
    return adapter_sums.mix_layers_slerp(first.state, second.state, weights[1], criterion, stored)


def _round_layers(
    layers: Iterable[MergedLayer], dtype: torch.dtype | None, tally: SurvivalTally
) -> Iterator[MergedLayer]:
    """The layers in the output's dtype; what is left of each input is added to the tally."""
    from merging.survival import rounding_shares

    for layer in layers:
        finished = layer if dtype is None else _round_layer(layer, dtype)
        if layer.inputs is not None and tally.count > 1:
            rounded = None
            before, after = layer.adapter, finished.adapter
            if isinstance(before, LowRank) and isinstance(after, LowRank) and after is not before:
                rounded = rounding_shares(before, after)
            tally.add_layer(layer.sources, layer.inputs, rounded)
        yield finished


def _round_layer(layer: MergedLayer, dtype: torch.dtype) -> MergedLayer:
    if not isinstance(layer.adapter, LowRank):  # others have this dtype already
        return layer
    try:
        adapter, report = round_adapter(layer.adapter, layer.report, dtype)
    except UserError as error:
        raise UserError(f"{layer.component}.{layer.path}: {error}") from None
    return layer._replace(adapter=adapter, report=report)
