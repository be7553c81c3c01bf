"""Records of training images: each image file with its captions and its mask.

Every file is decoded once (`image_checks`), so that a damaged one is an error before training.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_core.data.caption_tags import add_fixed_texts, compose_caption
from lora_core.data.captions import (
    FOLDER_NAME,
    CaptionMode,
    Captions,
    caption_suffixes,
    normalize_captions,
    read_caption_file,
    read_captions,
)
from lora_core.data.concept_folders import list_images
from lora_core.data.image_checks import CheckedImage, ImageChecks, ImageFile, check_image
from lora_core.data.images import mask_path
from lora_core.data.listing import (
    METADATA_TABLES,
    FolderContents,
    Listing,
    files_left_out,
    list_one_folder,
)
from lora_core.data.metadata_tables import read_metadata
from lora_core.data.shards.stored_files import FileSource, path_of
from lora_core.errors import UserError
from lora_core.placeholders import has_placeholder
from lora_core.settings import CaptionSettings

WHOLE = CaptionSettings()  # captions as they are written


@dataclass(frozen=True, slots=True)
class Record:
    """One image on disk, or the winner of a pair of images."""

    path: Path  # of its file, or the name of one inside a larger file
    captions: tuple[str, ...]
    mask_path: Path | None
    use_alpha: bool
    # hash of the image's bytes, its mask's, and whether alpha is the mask; of a pair that of both
    key: str
    size: tuple[int, int]  # h, w of the file, upright
    is_prior: bool = False
    source: Path | str = ""  # source of the captions: a file, or words of data.captions
    loser: "Record | None" = None  # of a pair, the image that this one is preferred to
    stored: FileSource | None = None  # where it is inside a larger file
    stored_mask: FileSource | None = None
    tags: CaptionSettings = WHOLE  # what a visit makes of a caption

    @property
    def plain_caption(self) -> str:
        """The first caption as people are shown it: without wildcards, its tags in their order."""
        return compose_caption(self.captions[0], self.tags)

    @property
    def file(self) -> FileSource:
        """Where the image is read from."""
        return self.stored or self.path

    @property
    def mask_file(self) -> FileSource | None:
        """Where the mask is read from; None where it has none, or its alpha is it."""
        return self.stored_mask or self.mask_path

    @property
    def has_mask(self) -> bool:
        """Whether it has a mask of its own, in a file or as alpha."""
        return self.use_alpha or self.mask_path is not None


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
    checks: ImageChecks | None = None,
    tags: CaptionSettings | None = None,
    must_use: bool = True,
) -> list[Record]:
    """The images of a folder with their captions and masks.

    The folder is one of images, of concepts, or a list of concepts (`concept_folders`). They
    include images below the folder that a metadata table names. The list has every image
    `repeats` times, and those of kohya's folder N_name (`listing.list_folder`) N times as often;
    in a `held_out` set each is listed once, and a caption that none of its images uses is no error;
    nor is it without `must_use`.

    Masks: "file" demands a mask for each image (001.mask.png, or other tools' names:
    `lora_core.data.listing`), "alpha" an alpha channel, "auto" takes existing mask files and
    ignores alpha, "any" takes mask files, else an alpha channel that is not the same everywhere,
    "none" ignores both. Caption modes and the caption's column in the table: `read_captions`.
    `tags`: the ending of caption files, and what a visit makes of captions. Raises UserError for
    missing or damaged files; `checks` says whether damaged ones are left out instead: images and
    masks that cannot be read, images whose caption file cannot be read, and names in a table
    without a file.
    """
    folder = Path(folder)
    _check_scan(folder, repeats, masks)
    checks = checks or ImageChecks()
    tags = tags or WHOLE
    if tags.caption_extension and captions == "auto":
        captions = "txt"
    tabled = captions in ("auto", "metadata")
    parts = list_images(folder, tabled=tabled, extension=tags.caption_extension).parts
    if tabled:
        parts = _add_tabled_parts(parts, caption_column, checks, may_be_empty=caption is not None)
    if checks.skips:
        parts = tuple(_without_bad_texts(part, captions, checks, tags) for part in parts)
    chosen = _choose_masks(parts, masks)
    common, extension = (captions, caption, caption_column), tags.caption_extension
    must_use = must_use and not held_out
    texts = read_captions(
        parts, *common, must_use=must_use, missing=checks.missing, extension=extension
    )
    files = [ImageFile(path, mask) for path, mask in chosen.items()]
    found = checks.check_all(files, masks, folder)
    if not any(found):
        raise UserError(describe_all_bad(folder, checks))
    made: dict[Path, Record] = {}
    for file, own in zip(files, found, strict=True):
        path = path_of(file.image)
        if own is not None:
            made[path] = with_tags(build_record(file, texts[path], own, is_prior=is_prior), tags)
    return _repeat_records(parts, made, 0 if held_out else repeats)


def _check_scan(folder: Path, repeats: int, masks: str) -> None:
    """Raises UserError for a folder that is not there, and options that have no such value."""
    if not folder.exists():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    if masks not in ("auto", "file", "alpha", "any", "none"):
        raise UserError(f"unknown masks {masks!r}, expected auto, file, alpha, any or none")


def _repeat_records(
    parts: Sequence[FolderContents], made: Mapping[Path, Record], repeats: int
) -> list[Record]:
    """The records in the folders' order, `repeats` times those of each; with 0 each once."""
    records: list[Record] = []
    for part in parts:
        readable = [made[path] for path in part.images if path in made]
        records += readable * part.repeats if repeats else readable
    return records * max(1, repeats)


def describe_all_bad(origin: Path | str, checks: ImageChecks) -> str:
    """The error where --data.skip-bad leaves nothing."""
    path, reason = next(iter(checks.left_out.items()))
    count = f"{len(checks.left_out)} image{'s' * (len(checks.left_out) > 1)}"
    return (
        f"--data.skip-bad leaves nothing of {origin}: none of its {count} can be read, first "
        f"{path} ({reason}); replace them"
    )


def loser_key(pair: str) -> str:
    """The key of the loser's image in a pair, whose own key is that of its winner."""
    return f"{pair}-loser"


def every_image(records: Iterable[Record]) -> Iterator[Record]:
    """The records, and after each winner of a pair its loser."""
    for record in records:
        yield record
        if record.loser is not None:
            yield record.loser


def find_unused_files(
    folder: Path | str | Listing, records: Sequence[Record], known: Iterable[Path] = ()
) -> dict[str, list[Path]]:
    """Reason -> the folder's files, and sub-folders with images, that these records do not use.

    `known`: files that are not named here, because another message names them.
    """
    used: set[Path] = set(known)
    for record in every_image(records):
        sources = (record.path, record.mask_path, record.source)
        used.update(path for path in sources if isinstance(path, Path))
    return files_left_out(list_again(folder, records), used)


def describe_unread_folder_names(folder: Path | str | Listing, records: Sequence[Record]) -> str:
    """One sentence about N_name folders (kohya) whose name is no caption, or "".

    It is for names that --data.caption or file names replace; caption files replace them as well,
    but as in kohya's scripts, which needs no message.
    """
    named = set()
    for record in records:
        if isinstance(record.source, Path) or record.source == FOLDER_NAME:
            named.add(record.path.parent)
    worded = [part for part in list_again(folder, records).parts if part.words]
    unread = [part for part in worded if part.folder not in named]
    if not unread:
        return ""
    shown = ", ".join(f"{part.words!r} of {part.folder.name}" for part in unread[:3])
    return (
        "folder names are no captions here "
        f"(others come of --data.caption or --data.captions): {shown}"
    )


def make_record(
    path: FileSource, captions: Captions, mask: FileSource | None, *, masks: str, is_prior: bool
) -> Record:
    """The record of one file, which is decoded as a check."""
    file = ImageFile(path, mask)
    return build_record(file, captions, check_image(file, masks), is_prior=is_prior)


def build_record(
    file: ImageFile, captions: Captions, checked: CheckedImage, *, is_prior: bool = False
) -> Record:
    """The record of a file that was checked."""
    image, mask = file
    return Record(
        path_of(image),
        captions.texts,
        None if mask is None else path_of(mask),
        *checked,
        is_prior,
        captions.source,
        stored=None if isinstance(image, Path) else image,
        stored_mask=None if mask is None or isinstance(mask, Path) else mask,
    )


def with_tags(record: Record, tags: CaptionSettings) -> Record:
    """The record with captions that a visit composes by these settings; prefix and suffix added."""
    return replace(record, captions=add_fixed_texts(record.captions, tags), tags=tags)


def without_mask(record: Record) -> Record:
    """The record of the same image without its mask, which is part of a record's key."""
    if not record.has_mask:
        return record
    captions = Captions(record.captions, record.source)
    made = make_record(record.file, captions, None, masks="none", is_prior=record.is_prior)
    return replace(made, tags=record.tags)


def images_missing_word(records: Sequence[Record], word: str) -> list[Path]:
    """The images, each once, with a caption without the word, as `bind_placeholders` finds it."""
    lacking = []
    for record in records:
        if not all(has_placeholder(caption, word) for caption in record.captions):
            lacking.append(record.path)
    return list(dict.fromkeys(lacking))


def list_again(folder: Path | str | Listing, records: Sequence[Record]) -> Listing:
    """The folder's listing, with the options that gave these records."""
    if isinstance(folder, Listing):
        return folder
    files = {record.source.name for record in records if isinstance(record.source, Path)}
    extension = records[0].tags.caption_extension if records else ""
    tabled = bool(files & set(METADATA_TABLES))
    return list_images(Path(folder), tabled=tabled, extension=extension)


def _without_bad_texts(
    part: FolderContents, mode: CaptionMode, checks: ImageChecks, tags: CaptionSettings
) -> FolderContents:
    """The folder without the images whose caption files cannot be read."""
    if mode not in ("auto", "txt") or (mode == "auto" and part.table is not None):
        return part
    suffixes = caption_suffixes(mode, tags.caption_extension)
    bad = set()
    for image, files in part.texts.items():
        for file in files:
            if file.suffix.lower() not in suffixes:
                continue
            try:
                normalize_captions(image, Captions(read_caption_file(file), file))
            except (UserError, OSError) as error:
                checks.leave_out(image, error)
                bad.add(image)
    images = tuple(image for image in part.images if image not in bad)
    texts = {image: files for image, files in part.texts.items() if image not in bad}
    return replace(part, images=images, texts=texts)


def _add_tabled_parts(
    parts: Sequence[FolderContents], column: str | None, checks: ImageChecks, *, may_be_empty: bool
) -> tuple[FolderContents, ...]:
    """The folders with the images below them that their metadata tables name."""
    return tuple(
        _add_tabled_images(part, column, checks, may_be_empty=may_be_empty) for part in parts
    )


def _add_tabled_images(
    part: FolderContents, column: str | None, checks: ImageChecks, *, may_be_empty: bool
) -> FolderContents:
    """The folder with images below it that its metadata table names, their masks and texts."""
    if part.table is None:
        return part
    rows = read_metadata(part.table, column, may_be_empty=may_be_empty, missing=checks.missing)
    named = set(rows)
    further = sorted(named - set(part.images))
    masks = dict(part.masks)
    texts = dict(part.texts)
    no_images = {*part.masks.values(), *part.unclaimed}
    for folder in sorted({path.parent for path in further}):
        below = list_one_folder(folder)
        masks |= {path: mask for path, mask in below.masks.items() if path in further}
        texts |= {path: own for path, own in below.texts.items() if path in further}
        no_images |= {*below.masks.values(), *below.unclaimed}
    if wrong := sorted(named & no_images):
        raise UserError(
            f"{part.table} names {wrong[0]}, which by its name is a mask and not an image; "
            "take its row out or rename the file"
        )
    return replace(part, images=(*part.images, *further), masks=masks, texts=texts, rows=rows)


def _choose_masks(parts: Sequence[FolderContents], masks: str) -> dict[Path, Path | None]:
    """Image -> mask file or None.

    Raises UserError for a missing one that was demanded, or one that belongs to no image.
    """
    images = list(itertools.chain.from_iterable(part.images for part in parts))
    if masks in ("alpha", "none"):
        return dict.fromkeys(images)
    found: dict[Path, Path] = {}
    unclaimed: list[Path] = []
    for part in parts:
        found |= part.masks
        unclaimed += part.unclaimed
    if unclaimed:
        raise UserError(
            f"the mask {unclaimed[0]} belongs to no image; name it after its image or remove it"
        )
    without = [image for image in images if image not in found]
    if masks == "file" and without:
        lacking = f"{len(without)} of {len(images)} images lack a mask, first {without[0]}"
        raise UserError(f"{lacking}; add {mask_path(without[0]).name} or take --data.masks auto")
    return {image: found.get(image) for image in images}
