"""Header entries about the images of a run: folders, repeats, tags of captions, buckets."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.config import Config
from lora_core.data.buckets import Size, bucket_sizes
from lora_core.data.dataset import ImageDataset
from lora_core.data.records import Record
from lora_core.data.sample_order import BucketOrder
from lora_core.placeholders import Placeholder
from training.headers.trigger_words import caption_in_tools
from training.setup import Data

IMAGES, CLASS_IMAGES = "images", "class images"  # for names of folders, which say who is shown


@dataclass(frozen=True)
class CountedFolder:
    """The images of one folder, as kohya counts them."""

    name: str
    records: tuple[Record, ...]  # each as often as an epoch has it
    is_prior: bool

    @property
    def images(self) -> dict[tuple[Path, str], Record]:
        """(path, key) -> record, each image once."""
        return {(record.path, record.key): record for record in self.records}

    @property
    def repeats(self) -> int:
        """How often an epoch has each of them."""
        return max(1, len(self.records) // len(self.images))

    @property
    def sizes(self) -> dict[str, Any]:
        """kohya's name, kind and counts of it."""
        return {
            "image_dir": self.name,
            "is_reg": self.is_prior,
            "img_count": len(self.images),
            "num_repeats": self.repeats,
        }

    @property
    def captions(self) -> dict[str, Any]:
        """kohya's options of its captions."""
        tags = self.records[0].tags
        return {
            "shuffle_caption": tags.shuffle_caption,
            "keep_tokens": tags.keep_tokens,
            "keep_tokens_separator": tags.keep_tokens_separator,
            "secondary_separator": tags.secondary_separator or None,
            "enable_wildcard": tags.wildcards,
            "caption_prefix": tags.caption_prefix or None,
            "caption_suffix": tags.caption_suffix or None,
        }


def split_subsets(data: Data) -> list[CountedFolder]:
    """The folders of the training images, then those of class images; a folder has its number for
    its name: `images`, `images (2)` ...
    """
    by_folder: dict[tuple[bool, Path], list[Record]] = {}
    for folder in filter(None, (data.training, data.class_images)):
        for record in folder.records:
            by_folder.setdefault((record.is_prior, record.path.parent), []).append(record)
    subsets = []
    for is_prior, name in ((False, IMAGES), (True, CLASS_IMAGES)):
        own = [records for (prior, _), records in by_folder.items() if prior is is_prior]
        for number, records in enumerate(own, start=1):
            numbered = name if number == 1 else f"{name} ({number})"
            subsets.append(CountedFolder(numbered, tuple(records), is_prior))
    return subsets


def count_tags(
    subset: CountedFolder, placeholders: Sequence[Placeholder], name: str
) -> dict[str, int]:
    """Tag -> number of captions that have it; tags are what stands between commas, in lower case.

    Learned words are called as in prompts of A1111 (`caption_in_tools`); `name` is that of the
    run's files.
    """
    counts: Counter[str] = Counter()
    for record in subset.images.values():
        for caption in record.captions:
            tags = caption_in_tools(caption, placeholders, name).lower().split(",")
            counts.update(tag.strip() for tag in tags if tag.strip())
    return dict(counts)


def describe_buckets_entry(
    config: Config, folders: Sequence[ImageDataset]
) -> dict[str, Any] | None:
    """kohya's ss_bucket_info: number of a bucket -> its width and height and its images, repeats
    included; None without buckets.
    """
    if not config.data.buckets:
        return None
    counts: Counter[Size] = Counter()
    errors: dict[tuple[Path, str], float] = {}
    for folder in folders:
        counts.update(folder.sizes)
        for record, (h, w) in zip(folder.records, folder.sizes, strict=True):
            height, width = record.size
            errors[record.path, record.key] = abs(w / h - width / height)
    d = config.data
    sizes = bucket_sizes(d.resolution, d.bucket_step, d.bucket_min, d.bucket_max)
    own = sorted(set(counts) - set(sizes))  # of images that are not enlarged
    buckets = {}
    for number, (h, w) in enumerate([*sizes, *own]):
        if count := counts[h, w]:
            buckets[str(number)] = {"resolution": [w, h], "count": count}
    mean = math.fsum(errors.values()) / len(errors)
    return {"buckets": buckets, "mean_img_ar_error": mean}


def steps_per_epoch(config: Config, training: ImageDataset) -> float:
    """Steps in which every training image is seen."""
    if config.data.buckets:
        return BucketOrder(training.sizes, config.images_per_step, config.seed).steps
    return len(training) / config.images_per_step


def dataset_entries(
    config: Config, data: Data, placeholders: Sequence[Placeholder], name: str, trigger: str
) -> dict[str, Any]:
    """kohya's entries about the images; numbers and None are not yet texts. A folder whose captions
    differ has the trigger words as its class tokens, which managers show.

    ss_datasets is what kohya writes of a dataset file, the others what it writes without one:
    readers look for either. Without captions where --files.header says so.
    """
    d, subsets = config.data, split_subsets(data)
    folders = list(filter(None, (data.training, data.class_images)))
    has_captions = config.files.header == "full"
    tags = {own.name: count_tags(own, placeholders, name) for own in subsets if has_captions}
    sizes: Sequence[Size] = ()
    if d.buckets:
        sizes = bucket_sizes(d.resolution, d.bucket_step, d.bucket_min, d.bucket_max)
    shared = {
        "num_train_images": sum(len(own.records) for own in subsets if not own.is_prior),
        "num_reg_images": sum(len(own.records) for own in subsets if own.is_prior),
        "batch_size_per_device": config.batch_size,
        "enable_bucket": d.buckets,
        "min_bucket_reso": min(map(min, sizes), default=None),
        "max_bucket_reso": max(map(max, sizes), default=None),
        "resize_interpolation": d.interpolation,
    }
    tables: dict[str, Any] = {
        "bucket_info": describe_buckets_entry(config, folders),
        "tag_frequency": tags,
    }
    augmentation = {"color_aug": d.jitter, "flip_aug": d.flip, "random_crop": d.crop == "random"}
    described = []
    dirs: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for own in subsets:
        words = None if own.is_prior else trigger or None
        if has_captions:
            words = _shared_caption(own, placeholders, name) or words
        described.append({**own.sizes, **augmentation, **own.captions, "class_tokens": words})
        dirs[own.is_prior][own.name] = {"n_repeats": own.repeats, "img_count": len(own.images)}
    square = [d.resolution, d.resolution]
    dataset = {"is_dreambooth": True, "resolution": square} | shared | tables
    tables["datasets"] = [dataset | {"subsets": described}]
    tables |= {"dataset_dirs": dirs[False], "reg_dataset_dirs": dirs[True]}
    if not has_captions:
        del tables["tag_frequency"], dataset["tag_frequency"]
    flat: dict[str, Any] = {**shared, **augmentation, "resolution": tuple(square)}
    flat["bucket_no_upscale"] = d.buckets and not d.bucket_upscale
    for key in ("shuffle_caption", "keep_tokens"):
        flat[key] = subsets[0].captions[key]
    flat["caption_tag_dropout_rate"] = subsets[0].records[0].tags.tag_dropout
    for key, value in tables.items():
        flat[key] = json.dumps(value, ensure_ascii=False)
    flat["total_batch_size"] = config.images_per_step
    batches = steps_per_epoch(config, data.training) * config.accumulation
    flat["num_batches_per_epoch"] = math.ceil(batches)
    return {f"ss_{key}": value for key, value in flat.items()}


def _shared_caption(
    subset: CountedFolder, placeholders: Sequence[Placeholder], name: str
) -> str | None:
    """The caption that all images of a folder have; None where they differ."""
    captions: set[str] = set()
    for record in subset.records:
        captions.update(record.captions)
    return caption_in_tools(captions.pop(), placeholders, name) if len(captions) == 1 else None
