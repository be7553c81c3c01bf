"""Progress in bytes and bytes per second, on a terminal only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from lora_core.escaped_output import hides_progress

Item = TypeVar("Item")


class ByteBar:
    """A bar over a known number of bytes, which closes when they are done."""

    def __init__(self, total: int, title: str) -> None:
        hidden = hides_progress()
        self.left = total
        self.bar: tqdm[None] = tqdm(
            total=total, desc=title, unit="B", unit_scale=True, disable=hidden, leave=False
        )

    def add(self, count: int) -> None:
        """Counts bytes that are done."""
        self.bar.update(count)
        self.left -= count
        if self.left <= 0:
            self.bar.close()


def count_items(sized: Iterable[tuple[Item, int]], total: int, title: str) -> Iterator[Item]:
    """The items of (item, bytes) with a bar, to which each is added when the next is asked for."""
    bar = ByteBar(total, title)
    try:
        for item, size in sized:
            yield item
            bar.add(size)
    finally:
        bar.bar.close()
