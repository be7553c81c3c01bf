"""A folder of images -> Record: which image has which captions and which mask.

Every file is decoded once, so that a bad one is refused early.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_core.data.captions import FOLDER_NAME, CaptionMode, Captions, read_captions, read_metadata
from lora_core.data.images import has_alpha_mask, mask_path, read_image
from lora_core.data.listing import (
    METADATA_TABLES,
    FolderContents,
    Listing,
    files_left_out,
    list_folder,
    list_one_folder,
)
from lora_core.errors import UserError
from lora_core.tokens import has_placeholder


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
    source: Path | str = ""  # of the captions: a file, or in words


def scan_folder(
    folder: Path | str,
    *,
    captions: CaptionMode = "auto",
    caption: str | None = None,
    caption_column: str | None = None,
    repeats: int = 1,
    masks: Literal["auto", "file", "alpha", "any", "none"] = "auto",
    is_prior: bool = False,
    held_out: bool = False,
) -> list[Record]:
    """The images of a folder (with a metadata table: also those it names below it) with their
    captions and masks.

    The list is `repeats` times over, and the images of kohya's folder N_name (`read_folder`) N
    times within it; for a `held_out` set each comes once, and a caption that none of its images
    takes is no mistake. Masks: "file" demands a mask for each image (001.mask.png, or as other
    tools call it: `lora_core.data.listing`), "alpha" an alpha channel, "auto" takes mask files
    where they are and ignores alpha, "any" takes mask files, else an alpha channel that is not the
    same everywhere, "none" ignores both. Caption modes and the caption's column in the table:
    `read_captions`. Raises UserError for what is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = (
            "is a file, not a folder; give the folder it lies in"
            if folder.is_file()
            else "does not exist; check the path"
        )
        raise UserError(f"the image folder {folder} {what}")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    if masks not in ("auto", "file", "alpha", "any", "none"):
        raise UserError(f"unknown masks {masks!r}, expected auto, file, alpha, any or none")
    tabled = captions in ("auto", "metadata")
    parts = list_folder(folder, tabled=tabled).parts
    if tabled:
        parts = tuple(
            _with_table(part, caption_column, may_be_empty=caption is not None) for part in parts
        )
    chosen = _masks(parts, masks)
    texts = read_captions(parts, captions, caption, caption_column, must_use=not held_out)
    records: list[Record] = []
    for part in parts:
        own = [
            _record(path, texts[path], chosen[path], masks=masks, is_prior=is_prior)
            for path in part.images
        ]
        records += own if held_out else own * part.repeats
    return records * (1 if held_out else repeats)


def find_unused_files(folder: Path | str, records: Sequence[Record]) -> dict[str, list[Path]]:
    """Why -> the files of the folder, and sub-folders with images, that these records of it do not
    read.
    """
    used = {
        path for r in records for path in (r.path, r.mask_path, r.source) if isinstance(path, Path)
    }
    return files_left_out(_listing_of(folder, records), used)


def describe_unread_folder_names(folder: Path | str, records: Sequence[Record]) -> str:
    """One sentence about folders called N_name (kohya) whose name --data.caption or file names
    replace; empty when there are none.

    Files with captions replace it too, as in kohya's scripts, of which nobody needs to be told.
    """
    named = {
        record.path.parent
        for record in records
        if isinstance(record.source, Path) or record.source == FOLDER_NAME
    }
    unread = [
        part
        for part in _listing_of(folder, records).parts
        if part.words and part.folder not in named
    ]
    if not unread:
        return ""
    shown = ", ".join(f"{part.words!r} of {part.folder.name}" for part in unread[:3])
    return (
        "folder names are no captions here (others come of --data.caption or --data.captions): "
        f"{shown}"
    )


def without_mask(record: Record) -> Record:
    """The record of the same image without its mask, which is part of a record's key."""
    if record.mask_path is None and not record.use_alpha:
        return record
    return _record(
        record.path,
        Captions(record.captions, record.source),
        None,
        masks="none",
        is_prior=record.is_prior,
    )


def images_missing_word(records: Sequence[Record], word: str) -> list[Path]:
    """The images with a caption in which `tokens.bind_placeholders` would not find the word, each
    once.
    """
    return list(
        dict.fromkeys(
            r.path for r in records if not all(has_placeholder(c, word) for c in r.captions)
        )
    )


def _listing_of(folder: Path | str, records: Sequence[Record]) -> Listing:
    """The folder as it was listed for these records of it."""
    return list_folder(
        Path(folder),
        tabled=any(
            isinstance(r.source, Path) and r.source.name in METADATA_TABLES for r in records
        ),
    )


def _with_table(part: FolderContents, column: str | None, *, may_be_empty: bool) -> FolderContents:
    """The folder with those images below it that its metadata table names, and what lies beside
    them.
    """
    if part.table is None:
        return part
    named = set(read_metadata(part.table, column, may_be_empty=may_be_empty))
    further = sorted(named - set(part.images))
    masks, texts, no_images = (
        dict(part.masks),
        dict(part.texts),
        {*part.masks.values(), *part.unclaimed},
    )
    for folder in sorted({path.parent for path in further}):
        below = list_one_folder(folder)
        masks |= {path: mask for path, mask in below.masks.items() if path in further}
        texts |= {path: own for path, own in below.texts.items() if path in further}
        no_images |= {*below.masks.values(), *below.unclaimed}
    if wrong := sorted(named & no_images):
        raise UserError(
            f"{part.table} names {wrong[0]}, which its name makes a mask and not an image; "
            "take its row out or rename the file"
        )
    return replace(part, images=(*part.images, *further), masks=masks, texts=texts)


def _masks(parts: Sequence[FolderContents], masks: str) -> dict[Path, Path | None]:
    """The mask file of each image; UserError for a missing one that was demanded, or one that
    belongs to no image.
    """
    images = [path for part in parts for path in part.images]
    if masks in ("alpha", "none"):
        return dict.fromkeys(images)
    found = {image: mask for part in parts for image, mask in part.masks.items()}
    unclaimed = [path for part in parts for path in part.unclaimed]
    if unclaimed:
        raise UserError(
            f"the mask {unclaimed[0]} belongs to no image; name it after its image or remove it"
        )
    without = [image for image in images if image not in found]
    if masks == "file" and without:
        lacking = f"{len(without)} of {len(images)} images lack a mask, first {without[0]}"
        raise UserError(f"{lacking}; add {mask_path(without[0]).name} or take --data.masks auto")
    return {image: found.get(image) for image in images}


def _record(
    path: Path, captions: Captions, mask: Path | None, *, masks: str, is_prior: bool
) -> Record:
    """The record of one file, which is decoded to see that it can be."""
    use_alpha = masks == "alpha" or (masks == "any" and mask is None and has_alpha_mask(path))
    size = read_image(path, mask, use_alpha=use_alpha).original_size
    content = hashlib.blake2b(path.read_bytes(), digest_size=16)
    content.update(b"alpha" if use_alpha else b"")
    if mask is not None:
        content.update(b"mask" + hashlib.blake2b(mask.read_bytes()).digest())
    return Record(
        path, captions.texts, mask, use_alpha, content.hexdigest(), size, is_prior, captions.source
    )
