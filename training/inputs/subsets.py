"""Several folders of training images in one run, [[data.subsets]]: the options of each, and class
images that are as many as the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from lora_core.config import Config, DataConfig
from lora_core.data.records import Record
from lora_core.errors import UserError
from lora_core.settings import CaptionSettings
from lora_core.subset_options import CaptionSource, Subset

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of training images with its options, those of [data] included."""

    images: str
    repeats: int
    is_prior: bool
    captions: CaptionSource
    caption: str | None
    tags: CaptionSettings


def list_image_folders(data: DataConfig, images: str = "") -> list[ImageFolder]:
    """The folders of a run: its subsets, else the one folder, which `images` names."""
    usual = _caption_settings(data)
    if not data.subsets:
        caption = data.caption or None
        return [ImageFolder(images, data.repeats, False, data.captions, caption, usual)]
    return [_resolve_subset(data, subset, usual) for subset in data.subsets]


def _resolve_subset(data: DataConfig, subset: Subset, usual: CaptionSettings) -> ImageFolder:
    own = {option.name: getattr(subset, option.name) for option in fields(CaptionSettings)}
    given = {name: value for name, value in own.items() if value is not None}
    return ImageFolder(
        images=subset.images,
        repeats=data.repeats if subset.repeats is None else subset.repeats,
        is_prior=subset.prior,
        captions=subset.captions or data.captions,
        caption=(data.caption if subset.caption is None else subset.caption) or None,
        tags=replace(usual, **given),
    )


def _caption_settings(data: Any) -> CaptionSettings:
    names = [option.name for option in fields(CaptionSettings)]
    return CaptionSettings(**{name: getattr(data, name) for name in names})


def has_class_subset(config: Config) -> bool:
    """Whether a subset has class images."""
    return any(subset.prior for subset in config.data.subsets)


def balance_class_images(records: Sequence[Record]) -> list[Record]:
    """The records, of which class images are as many as the others.

    Too many of them are left out from the end. Too few are repeated in their order, each image once
    more before any is twice more, as in kohya's sd-scripts.
    """
    own = [record for record in records if not record.is_prior]
    prior = {record.path: record for record in records if record.is_prior}
    paths = fill_up([record.path for record in records if record.is_prior], len(own))
    return own + [prior[path] for path in paths]


def fill_up(items: Sequence[T], count: int) -> list[T]:
    """The first `count` items; where there are fewer, each once more, in order, until there are."""
    further = itertools.cycle(dict.fromkeys(items))
    chosen = list(items[:count])
    while len(chosen) < count:
        chosen.append(next(further))
    return chosen


def check_subsets(config: Config) -> None:
    """Raises UserError for subsets that cannot be together with other options, or have none."""
    d = config.data
    if not d.subsets:
        return
    for other in ("images", "dataset", "pairs"):
        if getattr(d, other):
            raise UserError(
                f"--data.{other} {getattr(d, other)} is the only source of images where it is "
                "given; leave it out, or leave out the [[data.subsets]]"
            )
    for i, subset in enumerate(d.subsets):
        if not subset.images:
            raise UserError(f"data.subsets.{i} has no images; give the folder")
    if all(subset.prior for subset in d.subsets):
        raise UserError(
            "all of the [[data.subsets]] have class images (prior = true); add one with images to "
            "learn from"
        )
    if has_class_subset(config) and config.prior.prompt:
        raise UserError(
            "--prior.prompt adds class images to every batch, and a subset with prior = true has "
            "some already; leave out one of the two"
        )
