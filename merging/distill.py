"""merge.py distill: the difference of two models as an adapter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats.container import is_finite
from lora_core.formats.model_folders import weight_key
from merging.adapter_sums import DenseOptions, layers_by_key, sketch_generator
from merging.base_models import BaseModel, base_weight_reader, layer_keys, open_base_model
from merging.byte_progress import count_items
from merging.commands import Distill
from merging.factor_sums import one_thread
from merging.layer_choice import parse_layer_choice
from merging.output import (
    align_columns,
    check_adapter_output,
    make_output,
    print_note,
    print_written,
    report_table,
    round_adapter,
    settle_format,
    store_scales,
    write_adapter,
)
from merging.rounding import MOST_DOUBLES
from merging.stored_layers import LayerKey, StoredLayers, stored_layers
from merging.svd import distill_update
from merging.truncation import ApproximationReport, Keep


def run_distill(options: Distill) -> None:
    """Writes the adapter nearest to tuned - base, of every Linear and Conv2d layer that differs.

    Raises UserError before writing.
    """
    output = make_output("distill", options, [options.base, options.tuned])
    check_adapter_output(output)
    output = settle_format(output, layers=True, tokens=False)
    keep = options.keep.per_layer()
    if keep is None:
        raise UserError(
            "choose how much of the difference to keep: --rank 16, --max-error 0.1 or --energy 0.95"
        )
    base = open_base_model(options.base, options.files)
    tuned = open_base_model(options.tuned, options.files)
    _check_kinds(base, tuned)
    stored = stored_layers(output.format, base.layout)
    layers = stored.group_parts(_chosen_keys(base, options.layers))
    is_random = options.svd.svd == "randomized" and keep.rank is not None
    dense = DenseOptions(sketch=options.svd.seed if is_random else None)
    pair = ModelPair(base, tuned, stored)
    state, reports = _distill_layers(pair, layers, keep, dense, output.dtype)
    if not reports:
        raise UserError(
            f"{tuned.path} and {base.path} do not differ in any of {len(layers)} layers; there is "
            "nothing to distil"
        )
    state = stored.separate_layers(state)
    state, reports = store_scales(state, reports, output, base.layout)
    written = write_adapter(state, output, base.layout)
    print(report_table(reports))
    _print_uncovered(base, tuned, set(layers_by_key(state)))
    print_written(written, output)


def _check_kinds(base: BaseModel, tuned: BaseModel) -> None:
    is_same = set(base.model) == set(tuned.model)
    if not is_same or base.layout.components.keys() != tuned.layout.components.keys():
        raise UserError(
            f"{base.path} has {', '.join(base.model)}, {tuned.path} has {', '.join(tuned.model)}; "
            "give two models of one kind"
        )


def _chosen_keys(base: BaseModel, choice: str) -> Iterator[LayerKey]:
    """The layers of a model that match a choice; all of them without one."""
    keys = layer_keys(base)
    factor = parse_layer_choice(choice, keys, base.layout) if choice else None
    for key in keys:
        if factor is None or factor(*key):
            yield key


@dataclass(frozen=True)
class ModelPair:
    """Two models whose difference is distilled, and the layers that the output stores."""

    base: BaseModel
    tuned: BaseModel
    stored: StoredLayers

    def read_difference(self, key: LayerKey) -> Tensor:
        """tuned - base of one of our layers, in fp32 or better."""
        before = base_weight_reader(self.base)(*key)
        after = base_weight_reader(self.tuned)(*key)
        name = ".".join(key)
        if after.shape != before.shape:
            raise UserError(
                f"{name} is {list(before.shape)} in the base and {list(after.shape)} in the tuned "
                "model; give two models of one kind"
            )
        exact = torch.promote_types(torch.promote_types(after.dtype, before.dtype), torch.float32)
        delta = after.to(exact, copy=True)
        for difference, start in zip(_parts(delta), _parts(before)):
            difference.sub_(start)
        if not is_finite(delta):
            raise UserError(f"{name} holds NaN or Inf in one of the models; fix it first")
        return delta

    def count_bytes(self, parts: Collection[LayerKey]) -> int:
        """The bytes of these layers in both models."""
        return sum(self.base.layer_bytes(key) + self.tuned.layer_bytes(key) for key in parts)

    def stack_differences(self, key: LayerKey, parts: Collection[LayerKey]) -> Tensor | None:
        """tuned - base of a stored layer; None where no part differs."""
        deltas = {}
        for part in parts:
            delta = self.read_difference(part)
            if delta.any():
                deltas[part] = delta
        return self.stored.stack_dense(key, deltas) if deltas else None


def _distill_layers(
    pair: ModelPair,
    layers: Mapping[LayerKey, Collection[LayerKey]],
    keep: Keep,
    dense: DenseOptions,
    dtype: torch.dtype | None,
) -> tuple[AdapterState, dict[LayerKey, ApproximationReport]]:
    """The adapter of every stored layer that differs, and its report."""
    state = AdapterState()
    reports = {}
    with one_thread():
        sized = [(key, pair.count_bytes(parts)) for key, parts in layers.items()]
        for key in count_items(sized, sum(size for _, size in sized), "distil"):
            distilled = _distill_layer(pair, key, layers[key], keep, dense)
            if distilled is None:
                continue
            adapter, reports[key] = round_adapter(*distilled, dtype)
            state.components.setdefault(key[0], {})[key[1]] = adapter
    return state, reports


def _distill_layer(
    pair: ModelPair, key: LayerKey, parts: Collection[LayerKey], keep: Keep, dense: DenseOptions
) -> tuple[LowRank, ApproximationReport] | None:
    """The adapter of a stored layer and its report; None where it does not differ.

    A function of its own, so that its difference is freed before the next is read.
    """
    delta = pair.stack_differences(key, parts)
    if delta is None:
        return None
    return distill_update(delta, keep, generator=sketch_generator(key, dense))


def _print_uncovered(base: BaseModel, tuned: BaseModel, covered: set[LayerKey]) -> None:
    """Prints the share of the difference in tensors that adapters cannot change."""
    squares: dict[str, float] = {}
    count = 0
    for name in base.layout.components:
        weights = base.model[name]
        paths = [path for component, path in covered if component == name]
        held = {weight_key(weights, base.layout, name, path) for path in paths}
        for difference in _uncovered_differences(base, tuned, name, held):
            squares[name] = squares.get(name, 0.0) + difference
            count += difference > 0
    if not count:
        return
    table = [("not in the adapter", "|difference|")]
    table += [(name, f"{value**0.5:.3e}") for name, value in squares.items() if value]
    print("\n".join(align_columns(table)))
    print_note(
        f"{count} tensors that no such adapter can hold differ too: norms, biases, embeddings, or "
        "layers that were not chosen"
    )


def _uncovered_differences(
    base: BaseModel, tuned: BaseModel, name: str, held: Collection[str]
) -> Iterator[float]:
    """The squared norm of the difference of every tensor of a network that is not held."""
    first, other = base.model[name], tuned.model[name]
    for key, info in first.infos.items():
        is_shared = key in other.infos and other.infos[key].shape == info.shape
        if key not in held and info.dtype.is_floating_point and is_shared:
            yield _square_distance(first.read(key), other.read(key))


def _square_distance(first: Tensor, other: Tensor) -> float:
    """The squared norm of the difference, in fp64 a part at a time: tables of tokens are large."""
    parts = zip(_parts(first), _parts(other))
    return math.fsum(float((b.double() - a.double()).square().sum()) for a, b in parts)


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor's numbers, MOST_DOUBLES at a time."""
    return tensor.reshape(-1).split(MOST_DOUBLES)
