"""Probes of options of captions and of folders with captions of their own. Each says whether its
option had an effect on the data of a run: None where that cannot be told.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.data.caption_tags import split_caption
from lora_core.data.dataset import ImageDataset, Record
from lora_core.settings import CaptionSettings, ImageSettings
from training.inputs.subsets import list_image_folders
from training.probes.first_step import FirstStep, Probe
from training.probes.input_probes import enough_draws

MOST_RECORDS = 64  # whose captions are looked at
VISITS = 32  # to each


def changes_tags(option: str) -> Probe:
    """Whether visits to some image have another caption than with the option's default.

    None where a subset alone could show it, or where the draws may have been the same by chance.
    """

    def probe(first: FirstStep) -> bool | None:
        training = first.data.training
        usual = getattr(CaptionSettings(), option)
        own_records = [r for r in training.records if getattr(r.tags, option) != usual]
        distinct = list({record.path: record for record in own_records}.values())
        draws = 0  # of tags that may be dropped
        for record in distinct[:MOST_RECORDS]:
            bare = replace(record, mask_path=None, use_alpha=False, loser=None)
            tags: Any = replace(record.tags, **{option: usual})
            without = replace(bare, tags=tags)
            if _captions(bare, training.seed) != _captions(without, training.seed):
                return True
            draws += VISITS * len(split_caption(record.captions[0], record.tags)[1])
        p = max((record.tags.tag_dropout for record in distinct), default=0.0)
        if option == "tag_dropout" and draws < (enough_draws(p) or math.inf):
            return None
        return False if distinct else None

    return probe


def _captions(record: Record, seed: int) -> list[str]:
    """The captions of an image's first visits."""
    images = ImageDataset([record], ImageSettings(), seed=seed)
    return [images.caption(0, visit) for visit in range(VISITS)]


def reads_first_lines(first: FirstStep) -> bool:
    """--data.caption-lines first: whether each image has one caption."""
    records = first.data.training.records
    chosen = [record for record in records if record.tags.caption_lines == "first"]
    return all(len(record.captions) == 1 for record in chosen)


def has_prefix(first: FirstStep) -> bool:
    """--data.caption-prefix: whether captions begin with it."""
    records = first.data.training.records
    return all(r.captions[0].startswith(r.tags.caption_prefix) for r in records)


def has_suffix(first: FirstStep) -> bool:
    """--data.caption-suffix: whether captions end with it."""
    records = first.data.training.records
    return all(r.captions[0].endswith(r.tags.caption_suffix) for r in records)


def reads_subsets(first: FirstStep) -> bool:
    """[[data.subsets]]: whether every folder has images in the run."""
    paths = [record.path.resolve() for record in first.data.training.records]
    for folder in list_image_folders(first.config.data):
        root = Path(folder.images).resolve()
        place = root if root.is_dir() else root.parent
        if not any(path.is_relative_to(place) for path in paths):
            return False
    return True
