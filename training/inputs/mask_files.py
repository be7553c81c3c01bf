"""Masks of the training images by a segmenter: --data.masks clipseg:WORDS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import torch
from PIL import Image

from lora_core import distributed
from lora_core.config import Config, FoundMasks
from lora_core.data import dataset
from lora_core.data.images import mask_path, read_image
from lora_core.errors import UserError
from lora_core.progress import track
from lora_core.runs.pictures import save_png
from lora_core.text import shorten_value
from models import choose_device

if TYPE_CHECKING:
    from models.segmenter import ClipSegmenter

PUBLISHED_WEIGHTS = "CIDAS/clipseg-rd64-refined"  # those of cloneofsimo's lora_ppim
FOUND_MASKS: tuple[str, ...] = get_args(FoundMasks)


class SegmenterRequest(NamedTuple):
    """The words that a segmenter looks for."""

    weights: str  # folder or hub id
    words: str


def parse_segmenter(masks: str) -> SegmenterRequest | None:
    """What clipseg:WORDS or clipseg@MODEL:WORDS asks for; None for masks that exist already.

    Raises UserError for anything else than those and the names of FoundMasks.
    """
    if masks in FOUND_MASKS:
        return None
    name, _, words = masks.partition(":")
    kind, at, weights = name.partition("@")
    if kind != "clipseg" or not words.strip() or (at and not weights):
        raise UserError(
            f"--data.masks is {shorten_value(masks)}, expected {', '.join(FOUND_MASKS)}, or "
            'clipseg:WORDS such as "clipseg:a face" (clipseg@MODEL:WORDS for other weights)'
        )
    return SegmenterRequest(weights or PUBLISHED_WEIGHTS, words.strip())


def prepare_masks(config: Config, images: str, captions: Mapping[str, Any]) -> FoundMasks:
    """The masks that `scan_folder` is to look for, once a segmenter has written missing ones.

    A file is written beside each image that has none; none is ever replaced. Prints how many and
    where. Raises UserError where the weights cannot be had, and for images in which nothing is
    found, after the masks of the others are written.
    """
    wanted = parse_segmenter(config.data.masks)
    if wanted is None:
        return cast(FoundMasks, config.data.masks)
    with distributed.main_process_first():
        records = dataset.scan_folder(images, masks="auto", **captions)
        lacking = dict.fromkeys(record.path for record in records if record.mask_path is None)
        if lacking:
            _write_masks(wanted, list(lacking), choose_device(config.device))
    return "file"


def _write_masks(wanted: SegmenterRequest, images: Sequence[Path], device: torch.device) -> None:
    """Write the mask of each image beside it."""
    segmenter = _open_segmenter(wanted, device)
    written, empty = [], []
    for image in track(images, "masks", "image", len(images)):
        place = mask_path(image)
        if place.exists():  # two images of one name, such as a.jpg and a.png
            continue
        mask = segmenter.find(read_image(image).image, wanted.words)
        if mask is None:
            empty.append(image)
            continue
        save_mask(mask, place)
        written.append(place)
    if written:
        count = f"{len(written)} written for {wanted.words!r}, first {written[0]}"
        print(f"masks: {count}; look at them and correct them there, later runs read them")
    if empty:
        raise UserError(
            f"clipseg finds nothing like {wanted.words!r} in {len(empty)} of {len(images)} images, "
            f"first {empty[0]}; paint {mask_path(empty[0]).name} yourself or choose other words"
        )


def _open_segmenter(wanted: SegmenterRequest, device: torch.device) -> ClipSegmenter:
    from models.segmenter import ClipSegmenter  # its library takes seconds to import

    try:
        return ClipSegmenter(wanted.weights, device)
    except UserError as error:
        raise UserError(
            f"--data.masks: clipseg has no weights: {error}; "
            "or paint the masks yourself and give --data.masks file"
        ) from None


def save_mask(mask: Image.Image, place: Path) -> None:
    """Write a mask as PNG. Raises UserError where the folder cannot be written to."""
    try:
        save_png(mask, place)
    except OSError as error:
        raise UserError(
            f"cannot write the mask {place}: {error.strerror}; copy the images to a folder of yours"
        ) from None
