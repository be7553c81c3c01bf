"""--data.prepare: captions and masks that models write beside the images, to be edited by hand.

    python train.py --data.images photos --data.prepare blip "clipseg:a face"

Existing files are kept. Nothing is trained: the user looks at the files first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.atomic_files import atomic_write
from lora_core.config import Config
from lora_core.data.captions import read_caption_file
from lora_core.data.concept_folders import list_images
from lora_core.data.images import mask_path, read_image
from lora_core.data.listing import FolderContents
from lora_core.errors import UserError
from lora_core.progress import track
from lora_core.text import print_escaped
from models import choose_device
from training.inputs.annotators import (
    Annotator,
    Annotators,
    open_captioner,
    open_masker,
    parse_annotators,
)
from training.inputs.mask_files import save_mask

PREPARE_FLAG = "--data.prepare"


def split_prepare_words(words: list[str]) -> tuple[list[str], list[str] | None]:
    """(the other words, those of --data.prepare, which end at the next flag; None without it)."""
    given = [i for i, word in enumerate(words) if word.partition("=")[0] == PREPARE_FLAG]
    if not given:
        return words, None
    first = given[0]
    own = [words[first].partition("=")[2]] if "=" in words[first] else []
    last = first + 1
    while last < len(words) and not words[last].startswith("-"):
        own.append(words[last])
        last += 1
    return words[:first] + words[last:], own


def prepare_files(config: Config, words: list[str]) -> None:
    """Write missing captions and masks of --data.images beside the images, and print them.

    A caption begins with --data.caption, say "a photo of TOK", where that is given. Raises
    UserError where weights cannot be had, and for images in which no mask is found, after the
    files of the others are written.
    """
    wanted = parse_annotators(words)
    if not config.data.images:
        raise UserError(f"{PREPARE_FLAG} needs the folder of the images; add --data.images FOLDER")
    folder = Path(config.data.images)
    if not folder.exists():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    parts = list_images(folder).parts
    texts = _images_without(parts, lambda part, image: not _caption_of(part, image))
    masks = _images_without(parts, lambda part, image: image not in part.masks)
    if wanted.captions:
        _write_captions(wanted.captions, texts, config)
        parts = list_images(folder).parts
    if wanted.masks:
        _write_masks(wanted.masks, masks, _all_captions(parts), config)
    count = sum(len(part.images) for part in parts)
    print_escaped(f"{_describe_kept(wanted, count, len(texts), len(masks))}; nothing was trained")


def prepare_faces(config: Config, weights: str) -> None:
    """Write the missing masks of --data.images: boxes around faces. Raises UserError."""
    parts = list_images(Path(config.data.images), tabled=False).parts
    lacking = _images_without(parts, lambda part, image: image not in part.masks)
    _write_masks(Annotator("face", weights), lacking, {}, config)


def _images_without(parts: Any, lacks: Callable[[FolderContents, Path], bool]) -> list[Path]:
    """The images of all folders that lack something."""
    found: list[Path] = []
    for part in parts:
        found += [image for image in part.images if lacks(part, image)]
    return found


def _caption_of(part: FolderContents, image: Path) -> str:
    """The first caption in the files beside an image; "" without one."""
    for path in part.texts.get(image, ()):
        if texts := read_caption_file(path):
            return texts[0]
    return ""


def _all_captions(parts: Sequence[FolderContents]) -> dict[Path, str]:
    """The first caption of each image of all folders."""
    found: dict[Path, str] = {}
    for part in parts:
        found |= {image: _caption_of(part, image) for image in part.images}
    return found


def _describe_kept(wanted: Annotators, count: int, texts: int, masks: int) -> str:
    kept = []
    if wanted.captions:
        kept.append(f"{count - texts} of {count} images had a caption")
    if wanted.masks:
        kept.append(f"{count - masks} of {count} a mask")
    return f"kept: {', '.join(kept)}"


def _write_captions(wanted: Annotator, images: list[Path], config: Config) -> None:
    """Write NAME.txt beside each image, and print its text."""
    if not images:
        return
    captioner = open_captioner(wanted, choose_device(config.device))
    for image in track(images, "captions", "image", len(images)):
        place = image.with_suffix(".txt")
        if place.exists() and read_caption_file(place):  # two images of one name
            continue
        found = captioner.describe(read_image(image).image)
        text = ", ".join(filter(None, (config.data.caption, found)))
        _write_text(place, text)
        print_escaped(f"written: {place}: {text}")
    print(f"captions: edit them there, in NAME.txt; {wanted.weights} wrote them")


def _write_text(place: Path, text: str) -> None:
    try:
        with atomic_write(place) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {place}: {error.strerror}; copy the images to a folder of yours"
        ) from None


def _write_masks(
    wanted: Annotator, images: list[Path], captions: dict[Path, str], config: Config
) -> None:
    """Write NAME.mask.png beside each image, and print how much of it is white."""
    if not images:
        return
    find = bind_words(wanted, config)
    empty = []
    for image in track(images, "masks", "image", len(images)):
        place = mask_path(image)
        if place.exists():
            continue
        mask = find(read_image(image).image, captions.get(image, ""))
        if mask is None:
            empty.append(image)
            continue
        save_mask(mask, place)
        print_escaped(f"written: {place}: {describe_whiteness(mask)}")
    print(f"masks: correct them there, in NAME.mask.png; {wanted.weights} painted them")
    if empty:
        raise UserError(
            f"{wanted.kind} finds nothing in {len(empty)} of {len(images)} images, first "
            f"{empty[0]}; paint {mask_path(empty[0]).name} yourself, or choose other words"
        )


def bind_words(
    wanted: Annotator, config: Config, temperature: float = 1.0
) -> Callable[[Image.Image, str], Image.Image | None]:
    """(image, its caption) -> its mask; a segmenter without words looks for the caption."""
    masker: Any = open_masker(wanted, choose_device(config.device))

    def find(image: Image.Image, caption: str) -> Image.Image | None:
        if wanted.kind == "face":
            return masker.find(image)
        words = wanted.words or caption
        if not words:
            raise UserError(
                "clipseg looks for what an image's caption names, and an image has none; give "
                'words, such as "clipseg:a face", or let a model write captions: blip clipseg'
            )
        return masker.find(image, words, temperature)

    return find


def describe_whiteness(mask: Image.Image) -> str:
    """How much of a mask is at least half white."""
    levels = mask.histogram()
    return f"{sum(levels[128:]) / sum(levels):.0%} of it white"
