"""merge.py diff: how two adapters differ, by component and by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from merging.adapter_sums import LayerKey
from merging.commands import Diff
from merging.compare import compare_parameters, principal_angles
from merging.factor_sums import cosine_similarity
from merging.layer_spectra import LayerSpectrum, layer_spectra
from merging.opening import compare_headers, find_layout, is_whole_model, open_each
from merging.output import align_columns, print_note

Spectra = Mapping[LayerKey, LayerSpectrum]


def run_diff(options: Diff) -> None:
    """Prints cosines, relative differences and principal angles of two adapters."""
    paths = (options.first, options.second)
    for path in paths:
        if is_whole_model(path):
            raise UserError(
                f"{path} is a whole model, diff compares adapters; for models see distill and "
                "explain"
            )
    layout = find_layout(paths, options.files)
    states = open_each(paths, layout, options.files)
    compare_headers(states, paths, options.files)
    first, second = [_spectra_by_layer(path, own) for path, own in zip(paths, states)]
    if any(layer.adapter.magnitude is not None for layer in (*first.values(), *second.values())):
        print_note(
            "of a DoRA only the low-rank part is compared; the magnitudes act through the base "
            "model's weights"
        )
    for path, state in zip(paths, states):
        if not state.changed_components:
            raise UserError(f"{path} holds token rows only; diff compares layers")
    both = [key for key in first if key in second]
    for key in both:
        _check_shapes(first[key], second[key], paths)
    products = {key: _inner_product(first[key], second[key]) for key in both}
    table: list[tuple[str, ...]] = [
        ("", "layers", "only A", "only B", "|A|", "|B|", "cosine", "|A - B| / |A|")
    ]
    for name in dict.fromkeys(key[0] for key in (*first, *second)):
        table.append((name, *_comparison_cells(name, first, second, products)))
    a, b = [state.parameters for state in states]
    for name in a | b:
        cells = compare_parameters(a.get(name, {}), b.get(name, {}))
        table.append((f"{name}, norms and biases", *cells))
    table.append(("total", *_comparison_cells("", first, second, products)))
    print(f"A = {options.first}\nB = {options.second}")
    print("\n".join(align_columns(table)))
    if both:
        print(
            f"\nthe {min(options.top, len(both))} layers where they are largest; principal angles "
            "in degrees, smallest and median (90: nothing in common)"
        )
        print("\n".join(align_columns(_angle_table(first, second, products, options.top))))


def _spectra_by_layer(path: str, state: AdapterState) -> Spectra:
    spectra = {}
    for layer in layer_spectra(state, path):
        if isinstance(layer.adapter, DenseUpdate):
            raise UserError(
                f"{'.'.join(layer.key)} is a {layer.adapter.kind} update, not a product of two "
                "factors; resize makes a LoRA of it"
            )
        spectra[layer.key] = layer
    return spectra


def _check_shapes(first: LayerSpectrum, second: LayerSpectrum, paths: tuple[str, str]) -> None:
    a, b = _weight_shape(first.factors), _weight_shape(second.factors)
    if a != b:
        raise UserError(
            f"{'.'.join(first.key)} is {list(a)} in {paths[0]} and {list(b)} in {paths[1]}; they "
            "are for different models"
        )


def _weight_shape(lr: LowRank) -> tuple[int, ...]:
    return lr.up.shape[0], *lr.down.shape[1:]


def _inner_product(first: LayerSpectrum, second: LayerSpectrum) -> float:
    return cosine_similarity(first.factors, second.factors) * first.norm * second.norm


def _comparison_cells(
    component: str, first: Spectra, second: Spectra, products: Mapping[LayerKey, float]
) -> tuple[str, ...]:
    """The columns of one component, or of all of them for an empty name."""
    a = {key: layer for key, layer in first.items() if component in (key[0], "")}
    b = {key: layer for key, layer in second.items() if component in (key[0], "")}
    norm_a = math.sqrt(sum(layer.norm**2 for layer in a.values()))
    norm_b = math.sqrt(sum(layer.norm**2 for layer in b.values()))
    inner = sum(products[key] for key in a if key in b)
    distance = math.sqrt(max(0.0, norm_a**2 + norm_b**2 - 2 * inner))
    shared = len(a.keys() & b.keys())
    counts = shared, len(a) - shared, len(b) - shared
    cosine = f"{inner / (norm_a * norm_b):.4f}" if norm_a * norm_b else "-"
    relative = f"{distance / norm_a:.4g}" if norm_a else "-"
    return (*map(str, counts), f"{norm_a:.4g}", f"{norm_b:.4g}", cosine, relative)


def _angle_table(
    first: Spectra, second: Spectra, products: Mapping[LayerKey, float], top: int
) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", "cosine", "|B| / |A|", "outputs", "inputs")]
    for key in sorted(products, key=lambda key: -first[key].norm * second[key].norm)[:top]:
        a, b = first[key], second[key]
        if not a.norm * b.norm:
            continue
        angles = principal_angles(a.factors, b.factors)
        shown = [_smallest_and_median(part.tolist()) for part in (angles.outputs, angles.inputs)]
        cosine = products[key] / (a.norm * b.norm)
        table.append((".".join(key), f"{cosine:.4f}", f"{b.norm / a.norm:.3f}", *shown))
    return table


def _smallest_and_median(angles: Sequence[float]) -> str:
    """The smallest and the median of ascending angles [rad], as text in degrees."""
    return f"{math.degrees(angles[0]):.1f} {math.degrees(angles[len(angles) // 2]):.1f}"
