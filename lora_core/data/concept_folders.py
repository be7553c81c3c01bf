"""Mix-of-Show's layout of training data, which holds several concepts.

A concept is a folder with the sub-folders image, caption and mask, whose files have equal names:
image/01.jpg, caption/01.txt, mask/01.png. Several concepts are the sub-folders of one folder, or
are listed in a JSON file:

    [{"instance_prompt": "a photo of TOK", "instance_data_dir": "hermione/image",
      "caption_dir": "hermione/caption", "mask_dir": "hermione/mask"}, ...]

`instance_prompt` is the caption of images without a caption file. The folders lie next to the JSON
file or below the current folder, from which Mix-of-Show's scripts start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.listing import (
    CAPTION_SUFFIXES,
    NO_IMAGE,
    FolderContents,
    Listing,
    file_stem,
    is_junk,
    list_folder,
    list_one_folder,
    pair_texts,
)
from lora_core.errors import UserError
from lora_core.text import LONGEST_TABLE, nearest_hint, parse_json, read_text, shorten_value

IMAGE_FOLDERS, CAPTION_FOLDERS = ("image", "images"), ("caption", "captions")
MASK_FOLDERS = ("mask", "masks")
KEYS = ("instance_prompt", "instance_data_dir", "caption_dir", "mask_dir")  # of a concept
EXAMPLE = '[{"instance_prompt": "a photo of TOK", "instance_data_dir": "photos"}]'


def list_images(root: Path, *, tabled: bool = True, extension: str = "") -> Listing:
    """The contents of a folder of images, of a folder of concepts, or of a list of concepts.

    `extension`: a further ending of caption files next to the images of a folder, such as .tags.

    Raises UserError as `list_folder`, and for a file that is no list of concepts.
    """
    if root.is_file():
        return Listing(root, tuple(_read_concept_list(root)))
    own = list_one_folder(root, extension)
    concepts = [] if own.images or (tabled and own.table) else _find_concepts(root)
    if not concepts:
        return list_folder(root, own, tabled=tabled, extension=extension)
    known = {root / name for name in (*CAPTION_FOLDERS, *MASK_FOLDERS)}
    for concept in concepts:
        known |= {concept.folder, concept.folder.parent}
    others = {path: why for path, why in own.others.items() if path not in known}
    return Listing(root, tuple(concepts), others)


def _find_concepts(root: Path) -> list[FolderContents]:
    """The concept in a folder itself, else those in its sub-folders."""
    if (concept := _concept_in(root)) is not None:
        return [concept]
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_junk(path)]
    return [concept for concept in map(_concept_in, folders) if concept is not None]


def _concept_in(folder: Path) -> FolderContents | None:
    """The concept of a folder with image, and caption or mask, in it; None for another folder."""
    images = _sub_folder(folder, IMAGE_FOLDERS)
    captions, masks = _sub_folder(folder, CAPTION_FOLDERS), _sub_folder(folder, MASK_FOLDERS)
    if images is None or (captions is None and masks is None):
        return None
    concept = _list_concept(images, captions, masks, "")
    return concept if concept.images else None


def _sub_folder(folder: Path, names: Sequence[str]) -> Path | None:
    found = [path for path in sorted(folder.iterdir()) if path.name.lower() in names]
    return next((path for path in found if path.is_dir()), None)


def _list_concept(
    images: Path, captions: Path | None, masks: Path | None, words: str
) -> FolderContents:
    """The images of a folder with captions and masks of their names in two other folders."""
    part = replace(list_one_folder(images), words=words)
    if captions is not None:
        files = [path for path in _files_in(captions) if path.suffix.lower() in CAPTION_SUFFIXES]
        texts, strays = pair_texts(part.images, files)
        others = part.others | dict.fromkeys(strays, NO_IMAGE)
        part = replace(part, texts={**part.texts, **texts}, others=others)
    if masks is not None:
        files = [path for path in _files_in(masks) if path.suffix.lower() in IMAGE_SUFFIXES]
        named = {file_stem(path): path for path in files}
        own = {}
        for image in part.images:
            if file_stem(image) in named:
                own[image] = named.pop(file_stem(image))
        unclaimed = (*part.unclaimed, *named.values())
        part = replace(part, masks={**part.masks, **own}, unclaimed=unclaimed)
    return part


def _files_in(folder: Path) -> list[Path]:
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not is_junk(path)]
    return [path for path in paths if not path.name.startswith(".")]


# ---------------------------------------------------------------- a list of concepts


def _read_concept_list(file: Path) -> list[FolderContents]:
    """The concepts of a JSON file. Raises UserError for another file, naming what is wrong."""
    if file.suffix.lower() != ".json":
        raise UserError(
            f"the image folder {file} is a file, not a folder; give the folder it lies in"
        )
    advice = f"expected a list of concepts such as {EXAMPLE}"
    rows = parse_json(read_text(file, LONGEST_TABLE), str(file), advice)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is {shorten_value(rows)}; {advice}")
    return [_read_concept(file, row, number) for number, row in enumerate(rows, start=1)]


def _read_concept(file: Path, row: Any, number: int) -> FolderContents:
    where = f"concept {number} of {file}"
    if not isinstance(row, dict) or not isinstance(row.get("instance_data_dir"), str):
        raise UserError(
            f"{where} is {shorten_value(row)}, expected an object with instance_data_dir"
        )
    for key in row:
        if key not in KEYS:
            near = nearest_hint(key, KEYS, "the nearest is {} of ") or "known are "
            raise UserError(
                f"{where} has {shorten_value(key)}, which means nothing here; "
                f"{near}{', '.join(KEYS)}"
            )
    prompt = row.get("instance_prompt") or ""
    if not isinstance(prompt, str):
        raise UserError(f"instance_prompt of {where} is {shorten_value(prompt)}, expected a text")
    folders = [_named_folder(file, row, key, where) for key in ("caption_dir", "mask_dir")]
    images = _named_folder(file, row, "instance_data_dir", where)
    assert images is not None
    concept = _list_concept(images, folders[0], folders[1], prompt)
    if not concept.images:
        raise UserError(f"instance_data_dir of {where}, {images}, has no images that can be read")
    return concept


def _named_folder(file: Path, row: dict[str, Any], key: str, where: str) -> Path | None:
    """The folder that a concept names; None where it names none."""
    name = row.get(key)
    if name is None or name == "":
        return None
    if isinstance(name, str):
        for place in (file.parent / name, Path(name)):
            if place.is_dir():
                return place
    raise UserError(
        f"{key} of {where} is {shorten_value(name)}, which is no folder next to the file or below "
        "the current folder"
    )
