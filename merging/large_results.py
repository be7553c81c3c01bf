"""Sums of many adapters that are larger than memory: their size, and layers kept on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import LowRank
from lora_core.atomic_files import disk_errors, temporary_name
from lora_core.byte_sizes import format_bytes
from lora_core.errors import UserError
from merging.adapter_sums import MergedLayer, Term, weighted_layers

LARGE = 1 << 30  # bytes of a result from which on its layers are kept on the disk
SMALLER_RANK = 64  # that the note about a large result names


def exact_size(terms: Sequence[Term], dtype: torch.dtype | None) -> tuple[int, int, int]:
    """(bytes of an exact sum's factors, its largest rank, the bytes at SMALLER_RANK)."""
    size = largest = smaller = 0
    for weighted in weighted_layers(terms).values():
        rank = numbers = width = 0
        for _, lr in weighted:
            if isinstance(lr, LowRank):
                wide = torch.promote_types(lr.down.dtype, torch.float32)
                width = max(width, (dtype or wide).itemsize)
                rank += lr.rank
                numbers += lr.down.numel() + lr.up.numel()
        size += numbers * width
        smaller += numbers * width * min(rank, SMALLER_RANK) // max(1, rank)
        largest = max(largest, rank)
    return size, largest, smaller


def describe_size(terms: Sequence[Term], dtype: torch.dtype | None, path: str) -> str:
    """A sentence about the size of an exact sum that is to be written to `path`.

    Raises UserError where the disk has no room for it.
    """
    size, rank, smaller = exact_size(terms, dtype)
    needed = 2 * size if size >= LARGE else size
    free = shutil.disk_usage(_existing_parent(path)).free
    advice = f"; --rank {SMALLER_RANK} makes it {format_bytes(smaller)}" if smaller < size else ""
    if needed > free:
        raise UserError(
            f"the sum of {len(terms):,} files would take {format_bytes(size)} and "
            f"{format_bytes(needed)} while it is written, and {_existing_parent(path)} has "
            f"{format_bytes(free)}{advice}"
        )
    return (
        f"{path} holds the whole of {len(terms):,} files: rank {rank:,} in its largest layer, "
        f"about {format_bytes(size)}{advice}"
    )


def keep_on_disk(layers: Iterable[MergedLayer], path: str) -> Iterator[MergedLayer]:
    """The layers with their factors in files without a name, in the folder of `path`.

    Their pages are read and dropped as the machine needs it. Raises UserError for a full disk.
    """
    place = _existing_parent(path) / Path(path).name
    for layer in layers:
        lr = layer.adapter
        if isinstance(lr, LowRank):
            down, up = (_move_to_disk(tensor, place) for tensor in (lr.down, lr.up))
            layer = layer._replace(adapter=lr._replace(down=down, up=up))
        yield layer


def _move_to_disk(tensor: Tensor, place: Path) -> Tensor:
    """The tensor in a file that has no name any more, and is gone when nothing refers to it."""
    temporary = temporary_name(place)
    with disk_errors(place):
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:  # a page that the disk has no room for would end the process when it is written
                os.posix_fallocate(handle, 0, max(1, tensor.nbytes))
            finally:
                os.close(handle)
            kept = torch.from_file(
                str(temporary), shared=True, size=tensor.numel(), dtype=tensor.dtype
            )
        finally:
            temporary.unlink(missing_ok=True)
    return kept.reshape(tensor.shape).copy_(tensor)


def _existing_parent(path: str) -> Path:
    return next(place for place in Path(path).absolute().parents if place.exists())
