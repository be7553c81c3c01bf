"""The order of the layers in a merge of files whose layers are numbers (cloneofsimo's)."""

from __future__ import annotations

from collections.abc import Sequence

from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.layer_numbering import find_order, sort_layers
from lora_core.formats.layout import Layout

Order = tuple[str, ...]


def keep_layer_order(
    merged: AdapterState, states: Sequence[AdapterState], paths: Sequence[str], layout: Layout
) -> list[str]:
    """Puts the layers of a merge into the order of the first input that has one.

    Returns a note for each network whose inputs are in different orders.
    """
    notes = []
    for component, layers in merged.components.items():
        part = layout.components.get(component)
        if part is None or part.numbering is None:
            continue
        orders: dict[Order, str] = {}  # order -> the first file in it
        for state, path in zip(states, paths):
            own = find_order(state.components.get(component, {}), part.numbering)
            if own:
                orders.setdefault(own, path)
        if orders:
            first = next(iter(orders))
            merged.components[component] = {
                path: layers[path] for path in sort_layers(layers, first)
            }
        if len(orders) > 1:
            notes.append(_describe_orders(component, orders))
    return notes


def _describe_orders(component: str, orders: dict[Order, str]) -> str:
    """Which words of paths the files count in which order."""
    shown = []
    for order, path in orders.items():
        differing = [word for word, *others in zip(order, *orders) if set(others) != {word}]
        shown.append(f"{path} ({', '.join(differing)})")
    return (
        f"the layers of {component} are numbered in different orders by {' and '.join(shown)}; the "
        f"output is numbered as {next(iter(orders.values()))}"
    )
