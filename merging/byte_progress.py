"""Progress in bytes and bytes per second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from lora_core.progress import BYTES, ProgressBar

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
