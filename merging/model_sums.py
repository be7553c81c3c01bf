"""Sums of whole models, and adapters folded into them, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_core.adapters.weight_updates import AdapterState
from lora_core.errors import UserError
from lora_core.formats.model_files import write_checkpoint_file
from lora_core.formats.model_folders import Model, write_model_folder
from lora_core.formats.weights import PICKLED
from merging.adapter_sums import Term, every_layer, weighted_layers
from merging.base_models import (
    BaseModel,
    model_configs,
    network_locations,
    open_base_model,
    with_progress,
)
from merging.commands import FileReadOptions
from merging.custom_updates import is_custom, open_updates
from merging.expression import WeightedFile
from merging.folding import FoldStatistics, fold_adapters, rank_of_sum
from merging.layer_choice import choose_layers
from merging.model_tokens import add_token_rows, write_tokenizers
from merging.opening import is_whole_model
from merging.output import (
    Output,
    check_adapter_output,
    check_output,
    print_notes,
    print_warning,
    print_written,
    report_table,
    token_file_path,
    write_adapter,
)
from merging.parameter_sums import weighted_parameters
from merging.recipe import write_sidecar
from merging.token_names import describe_missing_tokens, describe_whole_rows, join_tokens

SURVIVING_ENERGY_WARNING = 0.95  # below this share of the update's energy a warning is printed


@dataclass(frozen=True)
class FoldOptions:
    """Options of a sum of models: the rounding loss as a file, tokens, the form of the output."""

    residual: str = ""  # file for the adapter of the rounding loss
    residual_rank: int = 0  # 0: the largest rank of the folded updates
    tokens: bool = True  # the adapters' tokens are written too
    folder: bool = False  # the output is a folder, whatever its ending
    kind: str = ""  # class of files with adapters of a user's class, FILE.py:Class


def write_model_sum(
    files: Sequence[WeightedFile],
    output: Output,
    reading: FileReadOptions,
    fold: FoldOptions = FoldOptions(),
) -> FoldStatistics:
    """Writes a sum in which at least one file is a whole model.

    Models are added, adapters folded into the sum, each tensor rounded once. Raises UserError
    before anything is written.
    """
    is_file = is_single_file_name(output.path) and not fold.folder
    check_output(output, folder=not is_file)
    if fold.residual:
        check_adapter_output(replace(output, path=fold.residual, format="diffusers"))
    models = [file for file in files if is_whole_model(file.path)]
    adapters = [file for file in files if file not in models]
    _check_weights(models)
    bases = [open_base_model(file.path, reading) for file in models]
    base = bases[0]
    states = [open_updates(file.path, base, reading, fold.kind) for file in adapters]
    if fold.kind and not any(is_custom(file.path, base) for file in adapters):
        raise UserError(
            f"--adapter-kind {fold.kind} has no effect: no file has adapters of a class of its "
            "own; leave it out"
        )
    terms = []
    for file, state in zip(adapters, states):
        factor = choose_layers(file, state, base.layout) if file.choices else every_layer
        terms.append(Term(state, file.weight, factor))
    statistics = FoldStatistics(residual_rank=_residual_rank(terms, fold))
    weighted = [(file.weight, own.model) for file, own in zip(models, bases)]
    model = fold_adapters(weighted, terms, base.layout, statistics, dtype=output.dtype)
    tokens = _join_tokens(adapters, states) if fold.tokens else AdapterState()
    if is_file:
        written = write_model_file(model, base, tokens, output)
    else:
        with model_configs(base, reading) as configs:
            written = write_diffusers_folder(model, base, tokens, output, configs)
    print_fold_table(statistics, terms)
    if fold.residual and statistics.residual.components:
        written += _write_residual(statistics, replace(output, path=fold.residual), base)
    print_written(written, output)
    return statistics


def write_model_file(
    model: Model, base: BaseModel, tokens: AdapterState, output: Output
) -> list[Path]:
    """Writes a model as one file, .safetensors or .ckpt, and tokens as a file next to it.

    A dry run computes every tensor and drops it.
    """
    path, locations = Path(output.path), network_locations(base)
    token_output = token_file_output(tokens, output)
    if output.dry_run:
        _read_all(with_progress(model, "checking"))
        return []
    write_checkpoint_file(
        with_progress(model, "writing"),
        locations,
        path,
        header=output.header,
        overwrite=output.overwrite,
    )
    token_files = write_adapter(tokens, token_output, base.layout) if token_output else []
    return [path, *token_files]


def write_diffusers_folder(
    model: Model, base: BaseModel, tokens: AdapterState, output: Output, configs: Path
) -> list[Path]:
    """Writes a model in the diffusers layout, with tokens in its tokenizers and tables.

    Everything but the weights comes from the folder `configs`. On a dry run every tensor is made
    and dropped.
    """
    model, added = add_token_rows(model, configs, tokens, base.layout)
    if output.dry_run:
        _read_all(with_progress(model, "checking"))
        return []

    def finish(folder: Path) -> None:
        write_tokenizers(added, model, configs, folder)
        if output.recipe:
            write_sidecar(output.recipe, folder)

    counted, path = with_progress(model, "writing"), Path(output.path)
    write_model_folder(counted, configs, path, overwrite=output.overwrite, finish=finish)
    return [path]


def token_file_output(tokens: AdapterState, output: Output) -> Output | None:
    """The file of tokens next to a model that is a single file, or None.

    A folder has them in it. Raises UserError for a file that cannot be written.
    """
    if not tokens.tokens or not is_single_file_name(output.path):
        return None
    file = str(token_file_path(Path(output.path)))
    found = replace(output, path=file, format="embeddings")
    check_output(found)
    return found


def is_single_file_name(path: str) -> bool:
    """Whether an output is a single file, by its ending."""
    return Path(path).suffix in (".safetensors", *PICKLED)


def print_fold_table(statistics: FoldStatistics, terms: Sequence[Term]) -> None:
    """Prints the table of a fold, and how much of the update is left in the rounded weights."""
    if statistics.roundings:
        _print_survival(statistics)
    if changed := len(weighted_parameters(terms)):
        print(f"{changed} norms and biases are changed too")


def _print_survival(statistics: FoldStatistics) -> None:
    percent = 100 * statistics.surviving_energy
    print(report_table(statistics.layer_reports()))
    print(f"{percent:.2f} % of the update's energy survived rounding to the output's dtype")
    if percent < 100 * SURVIVING_ENERGY_WARNING:
        print_warning(
            f"only {percent:.1f} % of the update survived rounding, less than "
            f"{100 * SURVIVING_ENERGY_WARNING:g} %; choose --dtype fp32, or keep the loss "
            "with --residual FILE"
        )


def _check_weights(models: Sequence[WeightedFile]) -> None:
    """Raises UserError for a sum that is not a model; warns if weights do not add up to 1."""
    for model in models:
        if model.choices:
            raise UserError(
                f"{model.path}@{model.choices[0]}: layers can be chosen of adapters only, "
                f"{model.path} is a whole model"
            )
    total = sum(model.weight for model in models)
    if abs(total) < 1e-6:
        raise UserError(
            "the weights of the models add up to 0, which leaves a difference, no model; distill "
            "makes an adapter of a difference"
        )
    if abs(total - 1) > 1e-6:
        print_warning(
            f"the weights of the models add up to {total:g}; a model whose weights all grow or "
            "shrink does not draw"
        )


def _join_tokens(files: Sequence[WeightedFile], states: Sequence[AdapterState]) -> AdapterState:
    paths, weights = [file.path for file in files], [file.weight for file in files]
    tokens, notes = join_tokens(states, paths)
    print_notes(notes, files)
    print_notes(describe_whole_rows(states, paths, weights), files)
    print_notes(describe_missing_tokens(states, paths), files)
    return tokens


def _residual_rank(terms: Sequence[Term], fold: FoldOptions) -> int:
    if not fold.residual:
        return 0
    largest = max(map(rank_of_sum, weighted_layers(terms).values()), default=0)
    return fold.residual_rank or largest


def _write_residual(statistics: FoldStatistics, output: Output, base: BaseModel) -> list[Path]:
    print(f"the rounding loss as an adapter of rank {statistics.residual_rank}:")
    print(report_table(statistics.residual_reports))
    own = replace(output, format="diffusers", dtype=None, recipe={})
    return write_adapter(statistics.residual, own, base.layout)


def _read_all(model: Model) -> None:
    for weights in model.values():
        for key in weights.infos:
            weights.read(key)
