"""Sums of adapter files: which layers and tokens come together, how much of them is kept, in which file they end."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from lora_core.adapters import weight_updates
from lora_core.adapters.weight_updates import AdapterState
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from merging import adapter_sums
from merging.adapter_sums import (
    DenseOptions,
    LayerKey,
    MergedLayer,
    Term,
    allot_ranks,
    every_layer,
    mix_layers_dense,
    mix_layers_slerp,
    rank_steps,
    weighted_layers,
)
from merging.compare import frobenius_norm
from merging.expression import WeightedFile
from merging.factor_sums import WeightedAdapters
from merging.layer_choice import multiply_factors, parse_layer_choice
from merging.opening import (
    OpenOptions,
    base_weight_reader,
    choose_output_format,
    find_layout,
    open_adapter,
    open_base_model,
    widest_dtype,
)
from merging.output import (
    Output,
    check_adapter_output,
    print_note,
    print_written,
    report_table,
    round_adapter,
    write_adapter,
)
from merging.svd import ApproximationReport, Keep, distill_update, one_thread
from merging.ties_dare import MERGES

MERGE_METHODS = ("sum", "slerp", *MERGES)
BUDGET = re.compile(r"(\d+(?:\.\d+)?)(|kb|mb|gb)", re.IGNORECASE)
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class KeepOptions:
    """How much of an update is kept: one of these, or all of it."""

    rank: int | None = None
    max_error: float | None = None
    energy: float | None = None
    budget: str = ""  # ranks of all layers together, or the file's size as 20MB

    def __post_init__(self) -> None:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("rank", "max_error", "energy")
            if getattr(self, name) is not None
        ]
        given += ["--budget"] if self.budget else []
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; choose one")
        if self.budget and not BUDGET.fullmatch(self.budget):
            raise UserError(
                f"--budget {self.budget} is no number of ranks and no size; write 1024, or 20MB"
            )
        try:
            self.keep()
        except ValueError as error:
            raise UserError(f"{given[0]}: {error}") from None

    def __bool__(self) -> bool:
        return bool(self.budget) or self.keep() is not None

    def keep(self) -> Keep | None:
        """The same for every layer; None for all of it, and for a budget."""
        if self.rank is None and self.max_error is None and self.energy is None:
            return None
        return Keep(self.rank, self.max_error, self.energy)

    def of(
        self, terms: Sequence[Term], dtype: torch.dtype | None
    ) -> Keep | Mapping[LayerKey, int] | None:
        """What `adapter_sums.mix_layers` takes. A budget is allotted to where the update is largest."""
        if not self.budget:
            return self.keep()
        number, unit = BUDGET.fullmatch(self.budget).groups()  # type: ignore[union-attr]
        if not unit:
            return allot_ranks(rank_steps(terms), total=round(float(number)))
        size = (dtype or torch.float32).itemsize
        return allot_ranks(
            rank_steps(terms),
            total=int(float(number) * UNITS[unit.lower()] / size),
            unit="parameters",
        )


@dataclass(frozen=True)
class MergeMethod:
    """How the updates come together."""

    name: str = "sum"
    density: float = 0.5  # share of the entries that ties, dare, dare_ties and magnitude keep
    seed: int = 0  # of what dare drops, and of the randomised SVD
    svd: str = "randomized"  # of dense updates; exact takes a second for a layer 1280 wide


def mix_adapters(
    entries: Sequence[WeightedFile],
    output: Output,
    reading: OpenOptions,
    *,
    amount: KeepOptions,
    method: MergeMethod,
) -> None:
    """Writes the sum of adapter files. Raises UserError before anything is written."""
    check_adapter_output(output)
    paths = [entry.path for entry in entries]
    layout = find_layout(paths, reading)
    output = replace(output, format=output.format or choose_output_format(paths))
    state, reports, said = _merge_files(
        entries, layout, output, reading, amount=amount, method=method
    )
    check_adapter_output(output, tokens=bool(state.tokens))
    for line in said:
        print_note(line)
    if reports:
        print(report_table(reports))
    print_written(write_adapter(state, output, layout), output)


def _merge_files(
    entries: Sequence[WeightedFile],
    layout: Layout | None,
    output: Output,
    reading: OpenOptions,
    *,
    amount: KeepOptions,
    method: MergeMethod,
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport], list[str]]:
    """The sum, its reports by layer, and sentences about its tokens. The inputs' memory is free when it is there."""
    paths = [entry.path for entry in entries]
    states = [open_adapter(path, layout, reading, merging=True) for path in paths]
    terms = [
        Term(state, entry.weight, chosen_layers(entry, state, layout))
        for entry, state in zip(entries, states)
    ]
    if amount and output.dtype is None:  # what is cut anyway is not written wider than it was
        output = replace(output, dtype=widest_dtype(states))
    state, reports = merge_terms(
        terms, amount, method, output, dense_options(terms, reading, method, amount)
    )
    joined, said = join_tokens(states, paths)
    state.tokens, state.token_names = joined.tokens, joined.token_names
    state.metadata = states[0].metadata | joined.metadata if len(states) == 1 else joined.metadata
    return state, reports, said


def chosen_layers(
    entry: WeightedFile, state: AdapterState, layout: Layout | None
) -> adapter_sums.LayerFactor:
    """The share of each layer that an entry's choices give."""
    keys = [(component, path) for component, rows in state.components.items() for path in rows]
    try:
        shares = [parse_layer_choice(text, keys, layout) for text in entry.choices]
    except UserError as error:
        raise UserError(f"{entry.path}: {error}") from None
    return multiply_factors(shares) if shares else every_layer


def dense_options(
    terms: Sequence[Term], reading: OpenOptions, method: MergeMethod, amount: KeepOptions
) -> DenseOptions:
    """How dense updates are merged: with the weights of --model where there is a DoRA. Raises UserError for a DoRA without them."""
    dora = any(
        lr.magnitude is not None
        for term in terms
        for rows in term.state.components.values()
        for lr in rows.values()
    )
    sketch = method.seed if method.svd == "randomized" and amount.rank is not None else None
    if not dora or (len(terms) == 1 and terms[0].weight == 1 and not amount):
        return DenseOptions(sketch=sketch)
    if not reading.model:
        raise UserError(
            "a sum with a DoRA in it depends on the weights of the base model; name it with --model, or fold the files into it"
        )
    return DenseOptions(base_weight_reader(open_base_model(reading.model, reading)), sketch)


def merge_terms(
    terms: Sequence[Term],
    amount: KeepOptions,
    method: MergeMethod,
    output: Output,
    dense: DenseOptions,
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """The merge as one record, in the output's dtype, and its reports by layer."""
    keys = len(list(weighted_layers(terms)))
    with one_thread():
        stream = _merged_layers(terms, amount, method, output.dtype, dense)
        bar = tqdm(
            stream,
            total=keys,
            desc=f"{method.name} of {len(terms)}",
            unit="layer",
            disable=None,
            leave=False,
        )
        return adapter_sums.collect_layers(_round_layer(layer, output.dtype) for layer in bar)


def join_tokens(
    states: Sequence[AdapterState],
    paths: Sequence[str],
    rename: Callable[[int, int, str], str] | None = None,
) -> tuple[AdapterState, list[str]]:
    """The tokens and placeholder words of several files as one record, and a sentence for each that had to be renamed.

    A name that an earlier file has becomes <s1-2>, TOK2; `rename(file, row, name)` names tokens otherwise. The same file twice counts once.
    Raises UserError for files with rows of different encoders.
    """
    rows: dict[str, list[torch.Tensor]] = {}
    taken: list[str] = []
    words: dict[str, tuple[str, ...]] = {}
    said, seen = [], set[str]()
    for i, (state, path) in enumerate(zip(states, paths)):
        if not state.tokens or path in seen:
            continue
        seen.add(path)
        if rows and set(rows) != set(state.tokens):
            raise UserError(
                f"{path} has token rows for {', '.join(state.tokens)}, an earlier file for {', '.join(rows)}; their tokens cannot share a file"
            )
        if rows and any(rows[key][0].shape[1] != own.shape[1] for key, own in state.tokens.items()):
            raise UserError(
                f"the token rows of {path} have another width than those of an earlier file; merge files of one model"
            )
        own_words = embeddings.placeholder_words(state, path)
        used = {*taken, *words}
        names = [
            rename(i, k, name) if rename else free_name(name, used)
            for k, name in enumerate(state.token_names)
        ]
        spoken = {word: free_name(word, used) for word in own_words}
        said += [
            f"{old} of {path} is called {new} in the result"
            for old, new in [*zip(state.token_names, names), *spoken.items()]
            if old != new
        ]
        new_name = dict(zip(state.token_names, names))
        words |= {
            spoken[word]: tuple(new_name[name] for name in own) for word, own in own_words.items()
        }
        taken += names
        for key, own in state.tokens.items():
            rows.setdefault(key, []).append(own)
    tokens = {key: torch.cat(parts) for key, parts in rows.items()}
    metadata = (
        {embeddings.TOKEN_NAMES: json.dumps(taken, ensure_ascii=False)} if taken else {}
    ) | embeddings.placeholder_header(words)
    return AdapterState(tokens=tokens, token_names=tuple(taken), metadata=metadata), said


def free_name(name: str, taken: set[str]) -> str:
    """The name, or the first of <s1-2>, <s1-3> ..., TOK2, TOK3 ... that is not taken."""
    numbered = (
        f"{name[:-1]}-{n}>" if name.endswith(">") else f"{name}{n}" for n in itertools.count(2)
    )
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _merged_layers(
    terms: Sequence[Term],
    amount: KeepOptions,
    method: MergeMethod,
    dtype: torch.dtype | None,
    dense: DenseOptions,
) -> Iterator[MergedLayer]:
    whole = {
        key: weighted
        for key, weighted in weighted_layers(terms)
        if any(_is_dense_update(lr) for _, lr in weighted)
    }
    if whole and (method.name != "sum" or amount.keep() is None):
        what = f"{'.'.join(next(iter(whole)))} is an update of LyCORIS, no product of two factors"
        raise UserError(
            f"{what}; say how much of it to keep with --rank, --max-error or --energy (and no --method), or fold it into a model"
        )
    if method.name == "sum":
        factors = (
            [Term(term.state, term.weight, _excluding(term.share, whole)) for term in terms]
            if whole
            else terms
        )
        return itertools.chain(
            adapter_sums.mix_layers(factors, amount.of(factors, dtype), dense),
            _distill_dense_layers(whole, amount, dense),
        )
    if amount.budget:
        raise UserError(
            f"--budget is for --method sum; {method.name} takes --rank, --max-error or --energy"
        )
    if method.name == "slerp":
        return _slerp_layers(terms, amount)
    keep = amount.keep()
    if keep is None:
        raise UserError(
            f"{method.name} gives updates of full rank; say how much of them to keep with --rank, --max-error or --energy"
        )
    return mix_layers_dense(
        terms, MERGES[method.name], keep, density=method.density, seed=method.seed, dense=dense
    )


def _is_dense_update(adapter: object) -> bool:
    return isinstance(adapter, weight_updates.DenseUpdate)


def _excluding(
    share: adapter_sums.LayerFactor, keys: Collection[LayerKey]
) -> adapter_sums.LayerFactor:
    return lambda component, path: 0.0 if (component, path) in keys else share(component, path)


def _distill_dense_layers(
    whole: Mapping[LayerKey, WeightedAdapters], amount: KeepOptions, dense: DenseOptions
) -> Iterator[MergedLayer]:
    """Layers in which an update is no product of two factors."""
    for key, weighted in whole.items():
        try:
            weight = dense.base(*key) if dense.base else None
            update = torch.stack(
                [strength * weight_updates.delta_weight(lr, weight) for strength, lr in weighted]
            ).sum(0)
            sketch = (
                None
                if dense.sketch is None
                else keyed_generator(dense.sketch, ".".join(key), 0, "sketch")
            )
            yield MergedLayer(
                *key, *distill_update(update, amount.keep() or Keep(energy=1.0), generator=sketch)
            )
        except ValueError as error:
            raise UserError(f"{'.'.join(key)}: {error}") from None


def _slerp_layers(terms: Sequence[Term], amount: KeepOptions) -> Iterator[MergedLayer]:
    """Between two files, as their weights say."""
    weights = [term.weight for term in terms]
    if (
        len(terms) != 2
        or min(weights) < 0
        or abs(sum(weights) - 1) > 1e-6
        or any(term.share is not every_layer for term in terms)
    ):
        shown = " and ".join(f"{weight:g}" for weight in weights)
        raise UserError(
            f"slerp takes two whole files whose weights add up to 1, such as 0.7*a + 0.3*b; got {len(terms)} with {shown}"
        )
    return mix_layers_slerp(terms[0].state, terms[1].state, weights[1], amount.keep())


def _round_layer(layer: MergedLayer, dtype: torch.dtype | None) -> MergedLayer:
    if layer.adapter is None:
        return layer
    try:
        adapter, report = round_adapter(layer.adapter, layer.report, dtype)
    except UserError as error:
        raise UserError(f"{layer.component}.{layer.path}: {error}") from None
    return layer._replace(adapter=adapter, report=report)


def resize_adapter(
    path: str, output: Output, reading: OpenOptions, *, amount: KeepOptions, method: MergeMethod
) -> None:
    """Writes the nearest adapter with as much as `amount` says; tokens and header stay."""
    if not amount:
        raise UserError(
            "say how much to keep: --rank 16, --max-error 0.05, --energy 0.99 or --budget 20MB"
        )
    mix_adapters([WeightedFile(1.0, path)], output, reading, amount=amount, method=method)


def convert_adapter(path: str, output: Output, reading: OpenOptions) -> None:
    """Writes the same adapter in another format. Factors stay as they are, but for a dtype that is given."""
    check_adapter_output(output)
    layout = find_layout([path], reading)
    state = open_adapter(path, layout, reading)
    check_adapter_output(output, tokens=bool(state.tokens))
    reports = {}
    for component, rows in state.components.items():
        for name, lr in rows.items():
            size = frobenius_norm(lr._replace(magnitude=None))
            rows[name], reports[component, name] = round_adapter(
                lr, ApproximationReport(lr.rank, lr.rank, size, 0.0), output.dtype
            )
    if reports:
        print(report_table(reports))
    print_written(write_adapter(state, output, layout), output)
