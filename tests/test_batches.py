"""Batches: rows of all members together, and micro-batches that keep pairs whole."""

import pytest
import torch

from lora_core.data import dataset
from lora_core.data.batches import Example, collate, micro_batches
from lora_core.data.dataset import ImageDataset, iterate_batches, scan_folder
from lora_core.errors import UserError
from tests.image_examples import WILD, noise_image, save_image
from tests.test_dataset import assert_same


def test_rows_of_a_batch_keep_their_pairing(image_folder):
    save_image(noise_image(12, 10, 3, "L"), image_folder / "0.mask.png")
    batch = next(
        iterate_batches(ImageDataset(scan_folder(image_folder), WILD), batch=5, seed=0, stop=1)
    )
    place = batch.captions.index(
        "a photo of TOK 0"
    )  # the one with a mask, so that alone it has the same members
    assert_same(
        dataset.collate(
            [ImageDataset(scan_folder(image_folder), WILD).example(0, batch.visits[place])]
        ),
        batch.rows(slice(place, place + 1)),
    )
    part = batch.rows(slice(1, 3))
    assert (
        part.keys == batch.keys[1:3]
        and part.captions == batch.captions[1:3]
        and part.crops == batch.crops[1:3]
    )
    assert (
        torch.equal(part.pixels, batch.pixels[1:3])
        and torch.equal(part.mask, batch.mask[1:3])
        and part.visits == batch.visits[1:3]
    )
    with pytest.raises(UserError, match="batch >= 1"):
        iterate_batches(ImageDataset(scan_folder(image_folder), WILD), batch=0, seed=0, stop=1)


def make_example(key: str, **kind: bool) -> Example:
    return Example(
        torch.full((3, 2, 2), float(ord(key[0]))), None, f"a {key}", (2, 2), (0, 0), key, 0,
        kind.get("is_prior", False), is_loser=kind.get("is_loser", False),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "parts"),
    [("abcd", ["ac", "bd"]), ("abcdABCD", ["acAC", "bdBD"]), ("aabbccdd", ["aacc", "bbdd"])],
    ids=["instances", "with class images", "pairs"],
)
def test_each_micro_batch_has_its_share_of_every_kind(keys: str, parts: list[str]) -> None:
    """Class images are in capitals; a key twice is a pair."""
    examples = []
    for i, key in enumerate(keys):
        is_loser = keys.count(key) == 2 and i % 2 == 1
        examples.append(make_example(key, is_prior=key.isupper(), is_loser=is_loser))
    batch = collate(examples)
    found = list(micro_batches(batch, 2))
    assert ["".join(part.keys) for part in found] == parts
    for part in found:
        assert part.pixels[:, 0, 0, 0].tolist() == list(map(float, map(ord, part.keys)))
        assert part.captions == [f"a {key}" for key in part.keys]
        assert part.is_prior.tolist() == [key.isupper() for key in part.keys]
        if part.is_loser is None:
            assert batch.is_loser is None and part.image_keys == part.keys
        else:
            assert part.is_loser.tolist() == [False, True] * 2
            assert part.image_keys == image_keys(part.keys)


def image_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{key}-loser" if i % 2 else key for i, key in enumerate(keys))
