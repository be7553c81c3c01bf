"""How much the updates of several adapters share: overlaps of their column and row spaces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.formats.recognition import recognize_file
from lora_core.progress import track
from merging.adapter_sums import LayerKey, layers_by_key
from merging.commands import OpenOptions
from merging.factor_sums import one_thread
from merging.opening import find_layout, is_whole_model, open_each
from merging.output import align_columns, print_note
from merging.svd import factor_svd

TOLERANCE = 1e-5  # of the largest singular value: directions below it are rounding
LISTED_NAMES = 3  # of files that are left out


class LayerSpaces(NamedTuple):
    """Orthonormal bases of an update's column and row space, of one layer."""

    outputs: list[Tensor]  # [out, k] of each group, fp64
    inputs: list[Tensor]  # [in, k] of each group, fp64
    norm: float  # Frobenius norm of the update


@dataclass
class PairOverlap:
    """The overlap of two files, summed over the layers that both have."""

    layers: int = 0
    weight: float = 0.0  # sum of |A| |B|
    outputs: float = 0.0  # weighted sums; `mean` divides
    inputs: float = 0.0
    chance: float = 0.0  # that of random spaces of these ranks
    largest: list[tuple[float, LayerKey, float, float]] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """The mean of outputs, inputs or chance over the layers, weighted by |A| |B|; nan without
        a common layer.
        """
        return float(getattr(self, name)) / self.weight if self.weight else math.nan


def space_overlap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """How much of the smaller of two spaces lies in the other, in [0, 1].

    mean_i cos^2 theta_i = |Q_a^T Q_b|_F^2 / min(k_a, k_b)

    Q_a [n, k_a] and Q_b [n, k_b] are orthonormal bases; the singular values of Q_a^T Q_b are the
    cosines of the principal angles theta (Bjorck and Golub 1973). 1: one space holds the other, as
    for equal files; 0: they are orthogonal, so that adding the updates disturbs neither. It is the
    measure of LoRA (arXiv 2106.09685, eq. 4). The groups of a grouped convolution, which are the
    items of the lists, count together. nan where a space is empty.
    """
    total = sum(float((a.mT @ b).square().sum()) for a, b in zip(first, second, strict=True))
    count = sum(min(a.shape[1], b.shape[1]) for a, b in zip(first, second, strict=True))
    return min(1.0, total / count) if count else math.nan


def layer_spaces(update: LowRank | DenseUpdate) -> LayerSpaces:
    """The bases of an update without the magnitude of a DoRA. Directions whose singular value is
    below TOLERANCE of the largest are left out.
    """
    if isinstance(update, DenseUpdate):
        u, values, vh = torch.linalg.svd(update.build().flatten(1).double(), full_matrices=False)
        u, sigma, vh = u[None], values[None], vh[None]
    else:
        u, sigma, vh = factor_svd(update._replace(magnitude=None))
    outputs, inputs = [], []
    for g, values in enumerate(sigma):
        k = int((values > TOLERANCE * sigma.max()).sum())
        outputs.append(u[g, :, :k].double())
        inputs.append(vh[g, :k].double().mT)
    return LayerSpaces(outputs, inputs, float(sigma.square().sum().sqrt()))


def pair_overlaps(
    states: Sequence[AdapterState],
) -> tuple[list[float], dict[tuple[int, int], PairOverlap]]:
    """(norm of each file, overlap of each pair of files), from one layer at a time.

    Raises UserError for a layer that has other sizes in another file.
    """
    layers = [layers_by_key(state) for state in states]
    squares = [0.0] * len(states)
    pairs = {pair: PairOverlap() for pair in combinations(range(len(states)), 2)}
    with one_thread():
        for key in _show_layers(layers):
            spaces = {i: layer_spaces(own[key]) for i, own in enumerate(layers) if key in own}
            for i, own in spaces.items():
                squares[i] += own.norm**2
            for i, j in combinations(spaces, 2):
                _add_layer(pairs[i, j], key, spaces[i], spaces[j])
    return list(map(math.sqrt, squares)), pairs


def _show_layers(layers: Sequence[Mapping[LayerKey, LowRank]]) -> Iterator[LayerKey]:
    """Every layer of the files once, with a progress bar."""
    keys: dict[LayerKey, None] = {}
    for own in layers:
        keys |= dict.fromkeys(own)
    yield from track(keys, "overlap", "layer", len(keys))


def _add_layer(pair: PairOverlap, key: LayerKey, a: LayerSpaces, b: LayerSpaces) -> None:
    sizes = [[(len(s.outputs), s.outputs[0].shape[0], s.inputs[0].shape[0])] for s in (a, b)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{'.'.join(key)} has other sizes in two of the files; they are for different models"
        )
    pair.layers += 1
    outputs, inputs = space_overlap(a.outputs, b.outputs), space_overlap(a.inputs, b.inputs)
    weight = a.norm * b.norm
    if not weight:
        return
    pair.weight += weight
    pair.outputs += weight * outputs
    pair.inputs += weight * inputs
    pair.chance += weight * (_chance(a.outputs, b.outputs) + _chance(a.inputs, b.inputs)) / 2
    pair.largest.append((max(outputs, inputs), key, outputs, inputs))


def _chance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The mean of `space_overlap` over random spaces: k_a k_b / n in |Q_a^T Q_b|_F^2."""
    total = sum(a.shape[1] * b.shape[1] / len(a) for a, b in zip(first, second, strict=True))
    count = sum(min(a.shape[1], b.shape[1]) for a, b in zip(first, second, strict=True))
    return total / count if count else math.nan


# ---------------------------------------------------------------- the tables of info


def print_overlaps(paths: Sequence[str], reading: OpenOptions, top: int) -> None:
    """Prints the norm of each file, the overlap of each pair, and the `top` layers that overlap
    most. Files of learned tokens are left out. Raises UserError for whole models.
    """
    for path in paths:
        if is_whole_model(path):
            raise UserError(f"{path} is a whole model; several files are compared as adapters")
    paths = _leave_out_token_files(paths)
    layout = find_layout(paths, reading)
    states = open_each(paths, layout, reading, merging=True)
    if any(map(_has_magnitude, states)):
        print_note(
            "of a DoRA only the low-rank part is compared; the magnitudes act through the base "
            "model's weights"
        )
    norms, pairs = pair_overlaps(states)
    names = [f"{i}" for i in range(1, len(paths) + 1)]
    print("\n".join(align_columns(_file_table(paths, states, norms))))
    print(
        "\noverlap of each pair, in [0, 1]: the mean cos^2 of the principal angles between the "
        "outputs\n(above the diagonal) and the inputs (below) of their updates; 1: the same "
        "directions, 0: none in common"
    )
    print("\n".join(align_columns(_overlap_matrix(names, pairs))))
    chances = [pair.mean("chance") for pair in pairs.values() if pair.weight]
    if chances:
        print(f"random updates of these ranks: {min(chances):.3f} to {max(chances):.3f}")
    if table := _largest_table(names, pairs, top):
        print(f"\nthe {len(table) - 1} layers that overlap most")
        print("\n".join(align_columns(table)))


def _leave_out_token_files(paths: Sequence[str]) -> list[str]:
    """The paths without files that hold learned tokens only, which have no layers to compare.

    Raises UserError where fewer than two remain.
    """
    kept = [path for path in paths if recognize_file(path).kind != "tokens"]
    left_out = [path for path in paths if path not in kept]
    if left_out and len(kept) < 2:
        raise UserError(
            f"{left_out[0]} holds learned tokens only, and overlaps are of layers; give two files "
            "with layers"
        )
    if left_out:
        names = ", ".join(left_out[:LISTED_NAMES])
        more = f" and {len(left_out) - LISTED_NAMES} more" if len(left_out) > LISTED_NAMES else ""
        print_note(
            f"files of learned tokens only are left out, as they have no layers: {names}{more}"
        )
    return kept


def _has_magnitude(state: AdapterState) -> bool:
    return any(lr.magnitude is not None for lr in layers_by_key(state).values())


def _file_table(
    paths: Sequence[str], states: Sequence[AdapterState], norms: Sequence[float]
) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("file", "format", "layers", "rank", "|delta W|")]
    for number, (path, state, norm) in enumerate(zip(paths, states, norms), start=1):
        layers = layers_by_key(state).values()
        ranks = [lr.rank for lr in layers if not isinstance(lr, DenseUpdate)]
        low, high = (min(ranks), max(ranks)) if ranks else (0, 0)
        rank = "dense" if not ranks else f"{low}" if low == high else f"{low}..{high}"
        name = f"{number:{len(str(len(paths)))}}  {Path(path).name}"
        table.append((name, formats.detect_format(path), str(len(layers)), rank, f"{norm:.4g}"))
    return table


def _overlap_matrix(
    names: Sequence[str], pairs: Mapping[tuple[int, int], PairOverlap]
) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", *names)]
    for i, name in enumerate(names):
        cells = []
        for j in range(len(names)):
            if i == j:
                cells.append("-")
                continue
            value = pairs[min(i, j), max(i, j)].mean("outputs" if i < j else "inputs")
            cells.append("none" if math.isnan(value) else f"{value:.3f}")
        table.append((name, *cells))
    return table


def _largest_table(
    names: Sequence[str], pairs: Mapping[tuple[int, int], PairOverlap], top: int
) -> list[tuple[str, ...]]:
    rows = []
    for (i, j), pair in pairs.items():
        for largest, key, outputs, inputs in pair.largest:
            rows.append((largest, f"{names[i]}, {names[j]}", key, outputs, inputs))
    rows.sort(key=lambda row: -row[0])
    table: list[tuple[str, ...]] = [("files", "outputs", "inputs", "layer")]
    for _, files, key, outputs, inputs in rows[:top]:
        table.append((files, f"{outputs:.3f}", f"{inputs:.3f}", ".".join(key)))
    return table if rows else []
