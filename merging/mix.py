"""merge.py mix: the weighted sum of adapter files, or of whole models with adapters on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from merging.adapter_sums import LayerFactor, LayerKey, Term, every_layer
from merging.expression import WeightedFile, parse_files, render_sum
from merging.merge_methods import dense_options, merge_terms
from merging.opening import (
    choose_output_format,
    find_layout,
    is_whole_model,
    open_adapter,
    widest_dtype,
)
from merging.options import DENSITY_METHODS, KeepOptions, MergeMethod, Mix, OpenOptions
from merging.output import Output, check_adapter_output, make_output, print_written, write_adapter
from merging.printing import print_note, report_table
from merging.truncation import ApproximationReport


def run_mix(options: Mix) -> None:
    """Writes the sum of adapters, or of models. Raises UserError, also for idle options."""
    files = parse_files(options.sum)
    if not options.out:
        raise UserError("no output; name a file with --out")
    output = make_output("mix", options, [file.path for file in files])
    has_model = any(is_whole_model(file.path) for file in files)
    _refuse_idle(options, has_model)
    if not has_model:
        mix_adapters(files, output, options.files, keep=options.keep, method=options.merge)
        return
    if options.keep or options.merge.method != "sum":
        raise UserError(
            f"{render_sum(files)} has a whole model in it, which has no rank to choose and no "
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
    layout = find_layout(paths, reading)
    output = replace(output, format=output.format or choose_output_format(paths))
    state, reports, notes = _merge_files(files, layout, output, reading, keep, method)
    check_adapter_output(output, tokens=bool(state.tokens))
    for note in notes:
        print_note(note)
    if reports:
        print(report_table(reports))
    print_written(write_adapter(state, output, layout), output)


def _merge_files(
    files: Sequence[WeightedFile],
    layout: Layout | None,
    output: Output,
    reading: OpenOptions,
    keep: KeepOptions,
    method: MergeMethod,
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport], list[str]]:
    """(the sum, its reports by layer, notes about renamed tokens).

    A function of its own, so that the memory of the inputs is free when the sum is written.
    """
    states = [open_adapter(file.path, layout, reading, merging=True) for file in files]
    terms = []
    for file, state in zip(files, states):
        terms.append(Term(state, file.weight, layer_factor(file, state, layout)))
    dtype = output.dtype
    if keep and dtype is None:  # what is cut anyway is not written wider than it was
        dtype = widest_dtype(states)
    dense = dense_options(terms, reading, method, keep)
    state, reports = merge_terms(terms, keep, method, dtype, dense)
    state.metadata = dict(states[0].metadata) if len(states) == 1 else {}
    if not any(own.tokens for own in states):
        return state, reports, []
    from merging.token_names import join_tokens

    joined, notes = join_tokens(states, [file.path for file in files])
    state.tokens, state.token_names = joined.tokens, joined.token_names
    state.metadata |= joined.metadata
    return state, reports, notes


def layer_factor(file: WeightedFile, state: AdapterState, layout: Layout | None) -> LayerFactor:
    """The factor of each layer of a file in a sum, by the choices behind its name."""
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
