"""The training images of a config: a folder, pairs, an exported dataset, or shards of one; and the
files that --data.skip-bad leaves out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_core import distributed
from lora_core.config import Config, FoundMasks
from lora_core.data import dataset
from lora_core.data.dataset import Record
from lora_core.data.image_checks import ImageChecks, describe_left_out
from lora_core.data.listing import Listing
from lora_core.data.pairs import scan_pairs
from lora_core.data.records import with_tags
from lora_core.errors import UserError
from lora_core.runs.run_folder import Run
from lora_core.text import print_escaped
from training.inputs import mask_files
from training.inputs.subsets import (
    ImageFolder,
    balance_class_images,
    has_class_subset,
    list_image_folders,
)

LEFT_OUT = "skipped_files.txt"  # in the run's folder: every file that is left out, with the reason


@dataclass(frozen=True)
class TrainingImages:
    """The images that a config trains on, and what is beside them."""

    records: list[Record]
    winners: list[Record]  # of pairs, as images of their own; without pairs the records
    listing: Listing | None  # of the folder; None for shards
    unused: Mapping[str, Sequence[Path]]  # reason -> files that nothing reads
    left_out: Mapping[Path, str]  # file that cannot be read -> reason


def open_training_images(config: Config) -> TrainingImages:
    """Find and check the training images. Prints those that are left out. Raises UserError."""
    d = config.data
    checks = ImageChecks(d.cache, skips=d.skip_bad, shares=True)
    if d.streaming:
        records = _open_stream(config, checks)
        _print_left_out(config, checks, records)
        return TrainingImages(records, records, None, {}, checks.left_out)
    folders = list_image_folders(d, "" if d.subsets else _images_folder(config))
    if d.pairs:
        captions = _caption_options(config, folders[0])
        tags = captions.pop("tags")
        images = folders[0].images
        winners, records = scan_pairs(images, d.pairs, repeats=d.repeats, **captions)
        winners, records = ([with_tags(r, tags) for r in part] for part in (winners, records))
        listing = dataset.list_again(images, records)
    else:
        scanned = [_scan_one(config, folder, checks) for folder in folders]
        records = list(itertools.chain.from_iterable(scanned))
        listing = _list_folders(folders, scanned)
        winners = records
        if has_class_subset(config):
            records = balance_class_images(records)
            winners = [record for record in records if not record.is_prior]
    _print_left_out(config, checks, records)
    named = _with_companions(listing, checks.left_out)
    unused = dataset.find_unused_files(listing, records, named)
    return TrainingImages(records, winners, listing, unused, checks.left_out)


def _scan_one(config: Config, folder: ImageFolder, checks: ImageChecks) -> list[Record]:
    """The images of one folder of the run."""
    d, options = config.data, _caption_options(config, folder)
    if d.subsets:  # where some images have texts, others may need none of the common caption
        options["must_use"] = False
    alone = ImageChecks(d.cache, skips=d.skip_bad)  # one process after another
    masks = mask_files.prepare_masks(config, folder.images, {**options, "checks": alone})
    return dataset.scan_folder(
        folder.images,
        repeats=folder.repeats,
        masks=masks,
        is_prior=folder.is_prior,
        checks=checks,
        **options,
    )


def _list_folders(folders: Sequence[ImageFolder], scanned: Sequence[Sequence[Record]]) -> Listing:
    """The contents of the folders; of several the root is the folder that all lie in."""
    pairs = zip(folders, scanned, strict=True)
    listings = [dataset.list_again(folder.images, records) for folder, records in pairs]
    if len(listings) == 1:
        return listings[0]
    parts = itertools.chain.from_iterable(listing.parts for listing in listings)
    others: dict[Path, str] = {}
    for listing in listings:
        others |= listing.others
    root = Path(os.path.commonpath([os.path.abspath(folder.images) for folder in folders]))
    return Listing(root, tuple(parts), others)


def open_held_out_images(config: Config) -> list[Record]:
    """The images of --validation.images; those that cannot be read are left out with
    --data.skip-bad.
    """
    checks = ImageChecks(config.data.cache, skips=config.data.skip_bad, shares=True)
    records = dataset.scan_folder(
        config.validation.images,
        masks="none",
        held_out=True,
        checks=checks,
        **_caption_options(config, list_image_folders(config.data)[0]),
    )
    if checks.left_out:
        _print_left_out(config, checks, records)
    return records


def write_left_out(left_out: Mapping[Path, str], run: Run) -> None:
    """Write OUT/skipped_files.txt, a line for each file left out, or remove an older one."""
    if left_out:
        lines = [f"{path}: {reason}\n" for path, reason in left_out.items()]
        run.write(LEFT_OUT, "".join(lines).encode(errors="backslashreplace").decode())
    elif run.writes:
        (run.folder / LEFT_OUT).unlink(missing_ok=True)


def check_data_options(config: Config) -> None:
    """Raises UserError for options that --data.streaming and --data.skip-bad cannot be with."""
    d = config.data
    if d.streaming and d.masks.startswith("clipseg"):
        raise UserError(
            f"--data.masks {d.masks} writes masks beside the images of a folder, and "
            "--data.streaming has none; leave --data.streaming out"
        )
    if d.skip_bad and d.pairs:
        raise UserError(
            "--data.skip-bad leaves out single images, and an image of --data.pairs has a partner; "
            "leave out one of the two"
        )


def _with_companions(listing: Listing, images: Iterable[Path]) -> set[Path]:
    """These images of a folder with their masks and caption files."""
    found = set(images)
    for part in listing.parts:
        for image in images:
            found.update(part.texts.get(image, ()))
            if image in part.masks:
                found.add(part.masks[image])
    return found


def _print_left_out(config: Config, checks: ImageChecks, records: Sequence[Record]) -> None:
    if config.data.skip_bad:
        total = len({record.path for record in records})
        print_escaped(describe_left_out(checks.left_out, total))


def _open_stream(config: Config, checks: ImageChecks) -> list[Record]:
    """The images in the shards of a dataset."""
    from lora_core.data.shards import streams  # the hub's client is needed for datasets only

    d = config.data
    options = streams.StreamOptions(
        d.split,
        d.image_column,
        d.caption_column,
        d.captions,
        d.caption or None,
        cast(FoundMasks, d.masks),
    )
    records = streams.scan_stream(d.dataset, options, checks, repeats=d.repeats)
    tags = list_image_folders(d)[0].tags
    return [with_tags(record, tags) for record in records]


def _images_folder(config: Config) -> str:
    """The folder of the training images; a data set from the hub is written to one first."""
    d = config.data
    if not d.dataset:
        return d.images
    from lora_core.data import hub  # its client is needed for such a data set only

    with distributed.main_process_first():
        folder = hub.export_dataset(
            d.dataset,
            split=d.split,
            image_column=d.image_column,
            caption_column=d.caption_column,
            caption=d.caption,
        )
    return str(folder)


def _caption_options(config: Config, folder: ImageFolder) -> dict[str, Any]:
    """Arguments of caption reading, the same for training and validation images."""
    column = None if config.data.dataset else config.data.caption_column or None
    return {
        "captions": folder.captions,
        "caption": folder.caption,
        "caption_column": column,
        "tags": folder.tags,
    }
