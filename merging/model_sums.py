"""Whole models: sums of checkpoints, adapters folded into them, adapters distilled out of them; tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from lora_core.adapters.patch import TOKENIZERS
from lora_core.adapters.weight_updates import AdapterState
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.formats.layout import Layout
from lora_core.formats.weights import PICKLED
from lora_core.formats.whole_models import write_checkpoint_file
from merging import adapter_sums
from merging.adapter_sums import LayerKey, MergedLayer, Term
from merging.expression import WeightedFile
from merging.folding import (
    FoldStatistics,
    ModelWeights,
    edit_json,
    fold_adapters,
    rank_of_sum,
    weight_key,
    with_embedding_rows,
    write_model_folder,
)
from merging.layer_choice import parse_layer_choice
from merging.mix import KeepOptions, MergeMethod, chosen_layers, free_name, join_tokens
from merging.opening import (
    BaseModel,
    OpenOptions,
    base_weight_reader,
    is_whole_model,
    model_configs,
    open_adapter,
    open_base_model,
    single_file_parts,
    with_progress,
)
from merging.output import (
    SIDECAR,
    Output,
    align_columns,
    check_adapter_output,
    check_output,
    print_note,
    print_warning,
    print_written,
    report_table,
    round_adapter,
    token_file_path,
    write_adapter,
)
from merging.svd import Keep, distill_update, one_thread

EMBEDDING_TABLES = (
    "embeddings.token_embedding.weight",
    "shared.weight",
)  # keys of CLIP's and T5's embedding tables
SURVIVING_ENERGY_WARNING = 0.95  # below this share of the update's energy a warning is printed


@dataclass(frozen=True)
class FoldOptions:
    """What else a fold does."""

    residual: str = ""  # file for the adapter of what rounding lost
    residual_rank: int = 0  # 0: the largest rank of the folded updates
    tokens: bool = True  # the adapters' tokens go along
    folder: bool = False  # the output is a folder, whatever its ending


def write_model_sum(
    entries: Sequence[WeightedFile],
    output: Output,
    reading: OpenOptions,
    how: FoldOptions = FoldOptions(),
) -> FoldStatistics:
    """Writes a sum in which at least one file is a whole model: models are added, adapters folded into the sum, each tensor rounded once.

    Raises UserError before anything is written.
    """
    single_file = is_single_file_name(output.path) and not how.folder
    check_output(output, folder=not single_file)
    if how.residual:
        check_adapter_output(replace(output, path=how.residual))
    wholes, adapters = (
        [e for e in entries if is_whole_model(e.path)],
        [e for e in entries if not is_whole_model(e.path)],
    )
    total = sum(entry.weight for entry in wholes)
    for entry in wholes:
        if entry.choices:
            raise UserError(
                f"{entry.path}@{entry.choices[0]}: layers can be chosen of adapters only, {entry.path} is a whole model"
            )
    if abs(total) < 1e-6:
        raise UserError(
            "the weights of the models add up to 0, which leaves a difference, no model; distill makes an adapter of a difference"
        )
    if abs(total - 1) > 1e-6:
        print_warning(
            f"the weights of the models add up to {total:g}; a model whose weights all grow or shrink does not draw"
        )
    bases = [open_base_model(entry.path, reading) for entry in wholes]
    states = [
        open_adapter(entry.path, bases[0].layout, reading, merging=True) for entry in adapters
    ]
    terms = [
        Term(state, entry.weight, chosen_layers(entry, state, bases[0].layout))
        for entry, state in zip(adapters, states)
    ]
    ledger = FoldStatistics(residual_rank=_residual_rank(terms, how))
    model = fold_adapters(
        [(entry.weight, base.model) for entry, base in zip(wholes, bases)],
        terms,
        bases[0].layout,
        ledger,
        dtype=output.dtype,
    )
    tokens, said = (
        join_tokens(states, [entry.path for entry in adapters])
        if how.tokens
        else (AdapterState(), [])
    )
    for line in said:
        print_note(line)
    if single_file:
        written = write_model_file(model, bases[0], tokens, output)
    else:
        with model_configs(bases[0], reading) as folder:
            written = write_diffusers_folder(model, bases[0], tokens, output, folder)
    _print_fold_table(ledger)
    if how.residual and ledger.residual.components:
        print(f"what rounding lost, as an adapter of rank {ledger.residual_rank}:")
        print(report_table(ledger.residual_reports))
        own = replace(output, path=how.residual, format="diffusers", dtype=None, recipe={})
        written += write_adapter(ledger.residual, own, bases[0].layout)
    print_written(written, output)
    return ledger


def write_model_file(
    model: ModelWeights, base: BaseModel, tokens: AdapterState, output: Output
) -> list[Path]:
    """A model as one file, .safetensors or .ckpt, and tokens as a file beside it. On a dry run every tensor is made and dropped."""
    path, rows = Path(output.path), single_file_parts(base)
    beside = replace(output, path=str(token_file_path(path)))
    if tokens.tokens:
        check_output(beside)
    if output.dry_run:
        _read_all(with_progress(model, "checking"))
        return []
    write_checkpoint_file(
        with_progress(model, "writing"),
        rows,
        path,
        header=output.header,
        overwrite=output.overwrite,
    )
    return [path, *(write_adapter(tokens, beside, base.layout) if tokens.tokens else [])]


def write_diffusers_folder(
    model: ModelWeights, base: BaseModel, tokens: AdapterState, output: Output, folder: Path
) -> list[Path]:
    """A model in the diffusers layout, with tokens in its tokenizers and tables; what is no weight comes from `folder`.

    On a dry run every tensor is made and dropped.
    """
    path = Path(output.path)
    model, places = add_token_rows(model, folder, tokens, base.layout)
    if output.dry_run:
        _read_all(with_progress(model, "checking"))
        return []

    def finish(new: Path) -> None:
        for component, names in places.items():
            tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZERS[component])
            tokenizer.add_tokens(list(names))
            tokenizer.save_pretrained(new / TOKENIZERS[component])
            table = next(key for key in model[component].infos if key.endswith(EMBEDDING_TABLES))
            edit_json(
                new / component / "config.json", vocab_size=model[component].infos[table].shape[0]
            )
        if output.recipe:
            (new / SIDECAR).write_text(
                json.dumps(output.recipe, sort_keys=True, indent=1, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )

    write_model_folder(
        with_progress(model, "writing"), folder, path, overwrite=output.overwrite, finish=finish
    )
    return [path]


def add_token_rows(
    model: ModelWeights, folder: Path, tokens: AdapterState, layout: Layout
) -> tuple[dict, dict[str, tuple[str, ...]]]:
    """(the model with the rows of new tokens in its tables, text encoder -> the tokens its tokenizer gets).

    Tokens that the tokenizer has already are renamed, and said so. Raises UserError for rows that do not fit.
    """
    grown, places = dict(model), dict[str, tuple[str, ...]]()
    names = tokens.token_names
    for component, key in layout.encoders.items():
        if key not in tokens.tokens:
            continue
        rows = tokens.tokens[key]
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZERS[component])
        taken = set(tokenizer.get_vocab())
        for i, name in enumerate(names):
            if name in taken and not places:
                names = (*names[:i], free_name(name, taken | set(names)), *names[i + 1 :])
                print_note(
                    f"the model has a token {name} already; that of the adapter is called {names[i]}"
                )
        tokenizer.add_tokens(list(names))
        ids = tokenizer.convert_tokens_to_ids(list(names))
        table = next(
            (name for name in model[component].infos if name.endswith(EMBEDDING_TABLES)), ""
        )
        if not table or model[component].infos[table].shape[1] != rows.shape[1]:
            width = model[component].infos[table].shape[1] if table else "no table"
            raise UserError(
                f"the token rows of {key} have width {rows.shape[1]}, this {component} takes {width}; are they for another model?"
            )
        grown[component] = with_embedding_rows(model[component], table, dict(zip(ids, rows)))
        places[component] = names
    if places:
        print(f"tokens {' '.join(names)} are in the tokenizer and the text encoder of the result")
    return grown, places


@dataclass(frozen=True)
class ModelDifference:
    """Of two models, in some or all of their layers."""

    base: str
    tuned: str
    layers: str = ""  # as after the @ of a sum; empty: all


def distill_difference(
    difference: ModelDifference,
    output: Output,
    reading: OpenOptions,
    *,
    amount: KeepOptions,
    method: MergeMethod,
) -> None:
    """Writes the adapter nearest to tuned - base, of every linear and convolutional layer that differs. Raises UserError before writing."""
    check_adapter_output(output)
    keep = amount.keep()
    if keep is None:
        raise UserError(
            "say how much of the difference to keep: --rank 16, --max-error 0.1 or --energy 0.95"
        )
    base, tuned = (
        open_base_model(difference.base, reading),
        open_base_model(difference.tuned, reading),
    )
    if (
        set(base.model) != set(tuned.model)
        or base.layout.components.keys() != tuned.layout.components.keys()
    ):
        raise UserError(
            f"{base.path} has {', '.join(base.model)}, {tuned.path} has {', '.join(tuned.model)}; give two models of one kind"
        )
    keys = [
        (component, path)
        for component, part in base.layout.components.items()
        for path in part.shapes
    ]
    chosen = (
        parse_layer_choice(difference.layers, keys, base.layout)
        if difference.layers
        else adapter_sums.every_layer
    )
    keys = [key for key in keys if chosen(*key)]
    before, after = base_weight_reader(base), base_weight_reader(tuned)
    state, reports = AdapterState(), {}
    with one_thread():
        for key in tqdm(keys, desc="distil", unit="layer", disable=None, leave=False):
            layer = _distill_pair(key, after(*key), before(*key), keep, method)
            if layer and layer.adapter:
                adapter, reports[key] = round_adapter(layer.adapter, layer.report, output.dtype)
                state.components.setdefault(key[0], {})[key[1]] = adapter
    if not reports:
        raise UserError(
            f"{tuned.path} and {base.path} do not differ in any of {len(keys)} layers; there is nothing to distil"
        )
    print(report_table(reports))
    _print_uncovered(base, tuned, set(reports))
    print_written(
        write_adapter(state, replace(output, format=output.format or "diffusers"), base.layout),
        output,
    )


def is_single_file_name(path: str) -> bool:
    """Whether an output is a single file, by its ending."""
    return Path(path).suffix in (".safetensors", *PICKLED)


def _distill_pair(
    key: LayerKey, after: torch.Tensor, before: torch.Tensor, keep: Keep, method: MergeMethod
) -> MergedLayer | None:
    if after.shape != before.shape:
        raise UserError(
            f"{'.'.join(key)} is {list(before.shape)} in the base and {list(after.shape)} in the tuned model; give two models of one kind"
        )
    exact = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
    delta = after.to(exact) - before.to(exact)
    if not torch.isfinite(delta).all():
        raise UserError(f"{'.'.join(key)} holds NaN or Inf in one of the models; mend it first")
    if not delta.any():
        return None
    sketch = (
        keyed_generator(method.seed, ".".join(key), 0, "sketch")
        if method.svd == "randomized" and keep.rank is not None
        else None
    )
    return MergedLayer(*key, *distill_update(delta, keep, generator=sketch))


def _residual_rank(terms: Sequence[Term], how: FoldOptions) -> int:
    if not how.residual:
        return 0
    return how.residual_rank or max(
        (rank_of_sum(weighted) for _, weighted in adapter_sums.weighted_layers(terms)), default=0
    )


def _read_all(model: ModelWeights) -> None:
    for weights in model.values():
        for key in weights.infos:
            weights.read(key)


def _print_fold_table(ledger: FoldStatistics) -> None:
    """The table of a fold, and how much of the update is left in the rounded weights."""
    if not ledger.roundings:
        return
    print(report_table(ledger.reports()))
    print(
        f"{100 * ledger.survived:.2f} % of the update's energy survived rounding to the output's dtype"
    )
    if ledger.survived < SURVIVING_ENERGY_WARNING:
        hint = "choose --dtype fp32, or keep what was lost with --residual FILE"
        print_warning(
            f"only {100 * ledger.survived:.1f} % of the update survived rounding, less than {100 * SURVIVING_ENERGY_WARNING:g} %; {hint}"
        )


def _print_uncovered(base: BaseModel, tuned: BaseModel, covered: set[LayerKey]) -> None:
    """How much of the difference lies where an adapter of linear and convolutional layers cannot reach."""
    held = {
        name: {
            weight_key(base.model[name], base.layout, name, path)
            for c, path in covered
            if c == name
        }
        for name in base.layout.components
    }
    square = {name: 0.0 for name in held}
    count = 0
    for name, difference in _uncovered_differences(base, tuned, held):
        square[name] += difference
        count += difference > 0
    if count:
        rows = [
            ("not in the adapter", "|difference|"),
            *((name, f"{value**0.5:.3e}") for name, value in square.items() if value),
        ]
        print("\n".join(align_columns(rows)))
        print_note(
            f"{count} tensors that no such adapter can hold differ too: norms, biases, embeddings, or layers that were not chosen"
        )


def _uncovered_differences(
    base: BaseModel, tuned: BaseModel, held: dict[str, set[str]]
) -> Iterator[tuple[str, float]]:
    """(component, squared norm of the difference) of every tensor that is not held."""
    for name, keys in held.items():
        other = tuned.model[name]
        for key, info in base.model[name].infos.items():
            if (
                key in keys
                or not info.dtype.is_floating_point
                or key not in other.infos
                or other.infos[key].shape != info.shape
            ):
                continue
            yield (
                name,
                float(
                    (other.read(key).double() - base.model[name].read(key).double()).square().sum()
                ),
            )
