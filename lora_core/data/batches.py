"""Examples of training images, and the batches that are made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.data.records import loser_key


@dataclass(frozen=True, eq=False)
class Example:
    """A training image as it is used in one visit: cropped, augmented, with its caption."""

    pixels: Tensor  # [3, h, w] in [-1, 1]
    mask: Tensor | None  # [1, h, w] in [0, 1]
    caption: str
    original_size: tuple[int, int]  # h, w of the file, upright
    crop: tuple[int, int]  # top, left in the resized (and mirrored, if it was) image
    key: str
    visit: int
    is_prior: bool
    dropped: bool = False  # whether the caption is empty because it was dropped
    is_loser: bool = False  # whether another example of the same key and visit is preferred to it


@dataclass
class Batch:
    """Examples stacked: instances, then as many prior examples if there are class images.

    Pairs are winner, loser, winner, loser ...: two examples of one key.
    """

    pixels: Tensor  # [b, 3, h, w] in [-1, 1]
    mask: Tensor | None  # [b, 1, h, w] in [0, 1]; None when no example has one
    captions: list[str]
    keys: tuple[str, ...]
    image_keys: tuple[str, ...]  # `keys`, but a loser's image has a key of its own
    visits: tuple[int, ...]
    is_prior: Tensor  # [b] bool
    original_sizes: list[tuple[int, int]]
    crops: list[tuple[int, int]]
    dropped: tuple[bool, ...]  # whether its caption was dropped, per example
    is_loser: Tensor | None = None  # [b] bool; None without pairs

    def rows(self, index: slice | Sequence[int]) -> "Batch":
        """The batch with some of its examples: rows(slice(0, 2)) are the first two."""
        chosen = range(len(self.keys))[index] if isinstance(index, slice) else index
        return Batch(
            pixels=self.pixels[index],
            mask=None if self.mask is None else self.mask[index],
            captions=[self.captions[i] for i in chosen],
            keys=tuple(self.keys[i] for i in chosen),
            image_keys=tuple(self.image_keys[i] for i in chosen),
            visits=tuple(self.visits[i] for i in chosen),
            is_prior=self.is_prior[index],
            original_sizes=[self.original_sizes[i] for i in chosen],
            crops=[self.crops[i] for i in chosen],
            dropped=tuple(self.dropped[i] for i in chosen),
            is_loser=None if self.is_loser is None else self.is_loser[index],
        )


def collate(examples: Sequence[Example]) -> Batch:
    """The examples as one batch; those without a mask get ones when others have one."""
    masks = [example.mask for example in examples]
    mask = None
    if any(own is not None for own in masks):
        ones = torch.ones_like(examples[0].pixels[:1])
        mask = torch.stack([ones if own is None else own for own in masks])
    losers = [example.is_loser for example in examples]
    return Batch(
        pixels=torch.stack([example.pixels for example in examples]),
        mask=mask,
        captions=[example.caption for example in examples],
        keys=tuple(example.key for example in examples),
        image_keys=tuple(loser_key(e.key) if e.is_loser else e.key for e in examples),
        visits=tuple(example.visit for example in examples),
        is_prior=torch.tensor([example.is_prior for example in examples]),
        original_sizes=[example.original_size for example in examples],
        crops=[example.crop for example in examples],
        dropped=tuple(example.dropped for example in examples),
        is_loser=torch.tensor(losers) if any(losers) else None,
    )


def micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in `parts` strided parts, each with its share of instances and prior examples.

    The two examples of a pair stay together. A batch of fewer examples has a part for each.
    """
    size = 1 if batch.is_loser is None else 2
    for i in range(min(parts, len(batch.keys) // size)):
        yield batch.rows([row for row in range(len(batch.keys)) if row // size % parts == i])
