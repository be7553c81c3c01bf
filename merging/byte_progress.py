"""Progress in bytes and bytes per second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lora_core.progress import BYTES, ProgressBar
from merging.adapter_sums import LayerKey, MergedLayer, Term, update_bytes, weighted_layers
from merging.stored_layers import StoredLayers

Item = TypeVar("Item")


class ByteBar:
    """A bar over a known number of bytes, which closes when they are done."""

    def __init__(self, total: int, title: str) -> None:
        self.bar = ProgressBar(title, total, BYTES)
        self.bar.__enter__()

    def add(self, count: int) -> None:
        """Counts bytes that are done."""
        self.bar.advance(count)
        if self.bar.done >= self.bar.total:
            self.bar.__exit__(None, None, None)


def count_items(sized: Iterable[tuple[Item, int]], total: int, title: str) -> Iterator[Item]:
    """The items of (item, bytes) with a bar, to which each is added when the next is asked for."""
    with ProgressBar(title, total, BYTES) as bar:
        for item, size in sized:
            yield item
            bar.advance(size)


def show_merged_layers(
    layers: Iterable[MergedLayer], terms: Sequence[Term], stored: StoredLayers, title: str
) -> Iterator[MergedLayer]:
    """The layers of a sum with a bar over the bytes of what is merged."""
    own = {key: update_bytes(weighted) for key, weighted in weighted_layers(terms).items()}
    sizes: dict[LayerKey, int] = {}
    for key, parts in stored.group_parts(own).items():
        sizes[key] = sum(own[part] for part in parts)
    sized = ((layer, sizes.get((layer.component, layer.path), 0)) for layer in layers)
    return count_items(sized, sum(sizes.values()), title)
