"""kohya's data sets as options of ours: [data] where all subsets agree, else [[data.subsets]]."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from lora_core.data.caption_tags import compose_caption
from lora_core.errors import UserError
from lora_core.settings import CaptionSettings
from lora_core.text import shorten_value
from training.translation.kohya_dataset import (
    FOLDERS,
    OF_A_DATASET,
    RENAMED,
    ForeignData,
    ForeignSubset,
    read_subset_captions,
)
from training.translation.kohya_options import IGNORED, LEFT_OUT, TOOL
from training.translation.kohya_values import split_resolution
from training.translation.translated_options import TranslatedOption, TranslatedOptions

# Options of a subset -> ours in [data] and [[data.subsets]].
OF_SUBSETS = {
    "image_dir": "images",
    "num_repeats": "repeats",
    "is_reg": "prior",
    "class_tokens": "caption",
    "caption_extension": "caption_extension",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "enable_wildcard": "wildcards",
    "shuffle_caption": "shuffle_caption",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_separator": "tag_separator",
    "secondary_separator": "secondary_separator",
}
OF_TEXTS = (  # that act on some captions and not on others
    "enable_wildcard", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
    "caption_tag_dropout_rate", "caption_separator", "secondary_separator",
)  # fmt: skip
MOVES = ("shuffle_caption", "caption_tag_dropout_rate")  # without which nothing need be kept
VISITS = 32
ONE_FOR_ALL = (
    "caption_dropout_rate", "flip_aug", "color_aug", "random_crop", "alpha_mask",
    "resize_interpolation", "resolution", "batch_size", "enable_bucket", "bucket_reso_steps",
    "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale",
)  # fmt: skip
IDLE = "no caption changes by it (in kohya's script neither)"
OVERRIDDEN = "every subset has a value of its own"
INTERPOLATIONS = {"lanczos": "lanczos", "bilinear": "bilinear", "linear": "bilinear"}
INTERPOLATIONS |= {"bicubic": "bicubic", "cubic": "bicubic"}


def translate_data(options: TranslatedOptions, data: ForeignData, version: str = "") -> None:
    """Record what becomes of the data sets, in `options` and in the record of the dataset file.

    `version`: "sdxl..." for a model whose empty prompt is zeros here and an encoding in kohya's.
    Raises UserError for what one run of ours cannot have.
    """
    subsets = data.subsets
    for subset in subsets:
        _check_kind(subset)
    if data.record is None:
        _record_folders(options, subsets)
    common = {name: _is_common(name, subsets) for name in OF_SUBSETS}
    single = len(subsets) == 1 and not subsets[0]["is_reg"] and not subsets[0]["class_tokens"]
    for name in OF_SUBSETS:
        is_own = name in ("image_dir", "is_reg", "class_tokens") or not common[name]
        _record_option(options, data, name, in_subsets=is_own and not single)
    _record_caption_source(options, subsets)
    if version.startswith("sdxl") and any(_values("caption_dropout_rate", subsets)):
        words = "a dropped caption is the empty one"
        options.take("caption_dropout_rate", {"data.dropped": "empty"}, words)
    for name in ONE_FOR_ALL:
        _record_common(options, data, name)
    _record_rest(options, data)


def _check_kind(subset: ForeignSubset) -> None:
    """Raises UserError for subsets of fine-tuning and of ControlNet."""
    for name, advice in (
        ("metadata_file", "write each caption next to its image, NAME.txt"),
        ("conditioning_data_dir", "masks are next to the images, NAME.mask.png"),
    ):
        if subset.values[name].place:
            raise UserError(f"{subset.place}{name} of {TOOL} is not read; {advice}")
    if not subset["image_dir"]:
        raise UserError(f"{subset.place}image_dir is missing; give the folder with the images")


def _record_folders(options: TranslatedOptions, subsets: list[ForeignSubset]) -> None:
    """The folders N_name, which are subsets here."""
    for name, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        count = sum(subset["is_reg"] == is_reg for subset in subsets)
        if options.is_given(name):
            words = f"{count} of its folders N_name: N repeats; the name where a caption is missing"
            options.take(name, {}, words)


def _values(name: str, subsets: Iterable[ForeignSubset]) -> list[Any]:
    return [subset[name] for subset in subsets]


def _is_common(name: str, subsets: list[ForeignSubset]) -> bool:
    values = _values(name, subsets)
    return all(value == values[0] for value in values)


def _has_effect(name: str, subset: ForeignSubset) -> bool:
    """Whether an option of captions changes one of the subset, as far as its files can be read."""
    texts = read_subset_captions(subset)
    if name not in OF_TEXTS or not texts:
        return True
    own = {ours: subset[theirs] for theirs, ours in OF_SUBSETS.items() if theirs in OF_TEXTS}
    given = {ours: value for ours, value in own.items() if value}
    for other in MOVES if name not in MOVES else ():
        if not _has_effect(other, subset):
            given.pop(OF_SUBSETS[other], None)
    if given.get("tag_dropout"):
        given["tag_dropout"] = 0.5  # which the visits below show, however rare it is
    tags: Any = replace(CaptionSettings(), **given)
    usual: Any = replace(tags, **{OF_SUBSETS[name]: getattr(CaptionSettings(), OF_SUBSETS[name])})
    return any(_outcomes(text, tags) != _outcomes(text, usual) for text in texts)


def _outcomes(text: str, tags: CaptionSettings) -> list[str]:
    """Captions of some visits with one generator, in which any option that acts is seen."""
    generator = torch.Generator().manual_seed(0)
    return [compose_caption(text, tags, generator) for _ in range(VISITS)]


def _record_option(
    options: TranslatedOptions, data: ForeignData, name: str, *, in_subsets: bool
) -> None:
    """The entries of an option of subsets: one for each place where it stands."""
    is_active = [_has_effect(name, subset) for subset in data.subsets]
    if not in_subsets:
        is_active = [any(is_active)]
    ours: dict[str, dict[str, Any]] = {}  # place -> options of ours
    for i, subset in enumerate(data.subsets):
        given = subset.values[name]
        value = _plain_value(name, given.value)
        key = f"data.subsets.{i}.{OF_SUBSETS[name]}" if in_subsets else f"data.{OF_SUBSETS[name]}"
        own = ours.setdefault(given.place, {})
        is_unset = value in (None, "", False) and not in_subsets
        if value is not None and not is_unset and is_active[i if in_subsets else 0]:
            own[key] = value
    usual = RENAMED.get(name, name)
    for place, found in ours.items():
        record = data.record if place else options
        own_name = place + name if place else usual
        if place == FOLDERS:
            if found:
                options.entries.append(_entry_of_folder(name, found, data.subsets))
            continue
        if record is None or own_name not in record.defaults:  # not given, and no default
            continue
        if found:
            record.take(own_name, found)
        elif record.is_given(own_name):
            record.ignore(own_name, "" if any(is_active) else IDLE)


def _entry_of_folder(
    name: str, found: dict[str, Any], subsets: list[ForeignSubset]
) -> TranslatedOption:
    values = _values(name, subsets)
    value = values[0] if len(values) == 1 else values
    return TranslatedOption(name, value, "taken", found, "of the folders' names", False)


def _plain_value(name: str, value: Any) -> Any:
    if name in ("keep_tokens", "num_repeats"):
        return int(value or 0)
    if name == "caption_tag_dropout_rate":
        return float(value or 0)
    if name in ("shuffle_caption", "enable_wildcard", "is_reg"):
        return bool(value)
    return value


def _record_caption_source(options: TranslatedOptions, subsets: list[ForeignSubset]) -> None:
    """Captions are in files; without wildcards only the first line of each is read."""
    lines = {"data.captions": "txt"}
    if not any(_values("enable_wildcard", subsets)):
        lines["data.caption_lines"] = "first"
    elif not _is_common("enable_wildcard", subsets):
        for i, subset in enumerate(subsets):
            lines[f"data.subsets.{i}.caption_lines"] = (
                "any" if subset["enable_wildcard"] else "first"
            )
    name = "train_data_dir" if subsets[0].place == FOLDERS else "dataset_config"
    options.take(name, lines, "captions are in files")


def _record_common(options: TranslatedOptions, data: ForeignData, name: str) -> None:
    """An option that all subsets have to share. Raises UserError where they differ."""
    values = _values(name, data.subsets)
    if not _is_common(name, data.subsets):
        where = "data sets" if name in OF_A_DATASET else "subsets"
        raise UserError(
            f"{name} differs between the {where} of {TOOL}, {shorten_value(values)}; a run here "
            "has one for all images: give them one value, or train one after the other, the second "
            "with --from-lora RUN"
        )
    given = data.subsets[0].values[name]
    ours, remark = _common_option(name, given.value, data)
    places = dict.fromkeys(subset.values[name].place for subset in data.subsets)
    for place in places:
        record, own = (data.record, place + name) if place else (options, RENAMED.get(name, name))
        assert record is not None
        is_usual = not record.is_given(own) and not _differs(ours)
        if is_usual:
            continue
        if remark:
            record.change(own, ours, remark)
        elif ours:
            record.take(own, ours)
        else:
            record.ignore(own, "as here")


def _differs(ours: dict[str, Any]) -> bool:
    """Whether options are worth a line of the table where nobody gave them."""
    return any(value not in (False, 0, 0.0, None) for value in ours.values())


def _common_option(name: str, value: Any, data: ForeignData) -> tuple[dict[str, Any], str]:
    """(options of ours, why they differ) of an option that all images share."""
    buckets = bool(data.subsets[0]["enable_bucket"])
    if name == "resolution":
        return _resolution(value, buckets=buckets)
    if name == "resize_interpolation":
        if value in INTERPOLATIONS:
            return {"data.interpolation": INTERPOLATIONS[value]}, ""
        given = value or "area down, lanczos up"
        return {"data.interpolation": "bilinear"}, f"{given} there; bilinear averages as it shrinks"
    if name in ("batch_size", "caption_dropout_rate"):
        ours = "batch_size" if name == "batch_size" else "data.caption_dropout"
        return {ours: value or 0}, ""
    if name == "color_aug":
        words = "brightness and contrast by 10 %, without hue" if value else ""
        return {"data.jitter": value}, words
    if name in ("flip_aug", "enable_bucket"):
        return {"data.flip" if name == "flip_aug" else "data.buckets": value}, ""
    if name == "random_crop":
        return {"data.crop": "random" if value else "center"}, ""
    if name == "alpha_mask":
        return ({"data.masks": "any"} if value else {}), ""
    if not buckets:
        return {}, ""
    limits = {"min_bucket_reso": "data.bucket_min", "max_bucket_reso": "data.bucket_max"}
    if name in limits:
        keeps_sizes = bool(data.subsets[0]["bucket_no_upscale"])
        return ({} if keeps_sizes else {limits[name]: int(value)}), ""
    if name == "bucket_no_upscale":
        return ({"data.bucket_upscale": False} if value else {}), ""
    return {"data.bucket_step": int(value)}, ""


def _resolution(value: Any, *, buckets: bool) -> tuple[dict[str, Any], str]:
    """(options, remark) of "512", "512,768", 512 or [512, 768]: width and height."""
    sides = split_resolution(value)
    if not sides:
        raise UserError(f"resolution of {TOOL} is missing; give it, such as resolution = 512")
    width, height = sides[0], sides[-1]
    if width == height:
        return {"data.resolution": width}, ""
    if not buckets:
        raise UserError(
            f"resolution of {TOOL} is {width} x {height}, and images are cut to squares here; give "
            "one side, or enable_bucket = true, which keeps the shape of each image"
        )
    side = math.isqrt(width * height)
    return {"data.resolution": side}, f"an area of {width} x {height} pixels is {side}^2"


def _record_rest(options: TranslatedOptions, data: ForeignData) -> None:
    """Entries of the options of the dataset file without a counterpart, and of repeated subsets."""
    if data.record is None:
        return
    told = {entry.name for entry in data.record.entries}
    for name in data.record.given:
        if name in told:
            continue
        last = name.rpartition(".")[2]
        place = name.removesuffix(last)
        usual = data.record[name] in (False, 0, None)
        if place in data.skipped:
            data.record.ignore(name, "the folder is in the data set already (kohya reads it once)")
        elif last in LEFT_OUT and not usual:
            data.record.leave_out(name, LEFT_OUT[last][1])
        elif last in LEFT_OUT or last in IGNORED:
            data.record.ignore(name, IGNORED.get(last, (None, "off"))[1])
        else:
            data.record.ignore(name, OVERRIDDEN)
