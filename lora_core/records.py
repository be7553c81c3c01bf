"""A folder of images -> Record: which image has which captions and which mask. Every file is decoded once, so that a bad one is refused early."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_core.captions import CaptionMode, metadata_table, read_captions, read_metadata
from lora_core.errors import UserError
from lora_core.images import MASK_SUFFIX, list_images, mask_path, read_picture
from lora_core.tokens import has_word


@dataclass(frozen=True)
class Record:
    """One image on disk."""

    path: Path
    captions: tuple[str, ...]
    mask_path: Path | None
    use_alpha: bool
    key: str  # hash of the image's bytes, its mask's, and whether alpha is the mask
    size: tuple[int, int]  # h, w of the file, upright
    is_prior: bool = False


def scan(
    folder: Path | str,
    *,
    captions: CaptionMode = "auto",
    caption: str | None = None,
    caption_column: str | None = None,
    repeats: int = 1,
    masks: Literal["auto", "file", "alpha", "none"] = "auto",
    is_prior: bool = False,
) -> list[Record]:
    """The images of a folder (with a metadata table: also those it names below it) with their captions and masks, the list `repeats` times over.

    Masks: "file" demands 001.mask.png for each image, "alpha" demands an alpha channel, "auto" takes mask files where they are and ignores alpha,
    "none" ignores both. Caption modes and the caption's column in the table: `read_captions`. Raises UserError for what is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    if masks not in ("auto", "file", "alpha", "none"):
        raise UserError(f"unknown masks {masks!r}, expected auto, file, alpha or none")
    images = _images(folder, captions, caption_column)
    if not images:
        raise UserError(f"no images in {folder}; put .jpg, .jpeg, .png, .webp or .bmp files there")
    chosen = _masks(folder, images, masks)
    texts = read_captions(folder, images, captions, caption, caption_column)
    return [_record(p, texts[p], chosen[p], use_alpha=masks == "alpha", is_prior=is_prior) for p in images] * repeats


def unmasked(record: Record) -> Record:
    """The record of the same image without its mask, which is part of a record's key."""
    if record.mask_path is None and not record.use_alpha:
        return record
    return _record(record.path, record.captions, None, use_alpha=False, is_prior=record.is_prior)


def missing_word(records: Sequence[Record], word: str) -> list[Path]:
    """The images with a caption in which `tokens.bind` would not find the word, each once."""
    return list(dict.fromkeys(r.path for r in records if not all(has_word(c, word) for c in r.captions)))


def _images(folder: Path, captions: str, column: str | None) -> list[Path]:
    """The folder's images, and those below it that the metadata table names when captions come from there."""
    found = list_images(folder)
    table = metadata_table(folder) if captions in ("auto", "metadata") else None
    if table is not None:
        found += sorted(set(read_metadata(table, column)) - set(found))
    return found


def _masks(folder: Path, images: list[Path], masks: str) -> dict[Path, Path | None]:
    """The mask file of each image; UserError for a missing one that was demanded, or one that belongs to no image."""
    if masks in ("alpha", "none"):
        return dict.fromkeys(images)
    chosen = {p: mask_path(p) if mask_path(p).is_file() else None for p in images}
    stray = sorted(set(folder.glob("*" + MASK_SUFFIX)) - set(chosen.values()))
    if stray:
        raise UserError(f"the mask {stray[0]} belongs to no image; name it after its image or remove it")
    without = [p for p, mask in chosen.items() if mask is None]
    if masks == "file" and without:
        first = mask_path(without[0]).name
        raise UserError(f"{len(without)} of {len(images)} images lack a mask, first {without[0]}; add {first} or ask for masks 'auto'")
    return chosen


def _record(path: Path, captions: tuple[str, ...], mask: Path | None, *, use_alpha: bool, is_prior: bool) -> Record:
    """The record of one file, which is decoded to see that it can be."""
    size = read_picture(path, mask, use_alpha=use_alpha).original_size
    content = hashlib.blake2b(path.read_bytes(), digest_size=16)
    content.update(b"alpha" if use_alpha else b"")
    if mask is not None:
        content.update(b"mask" + hashlib.blake2b(mask.read_bytes()).digest())
    return Record(path, captions, mask, use_alpha, content.hexdigest(), size, is_prior)
