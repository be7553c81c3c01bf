"""Captions of a folder of images: text files, a metadata table, file names, one for all, or templates."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_core.errors import UserError
from lora_core.images import is_image

CaptionMode = Literal["auto", "txt", "metadata", "filename", "one", "object", "style"]
CAPTION_MODES = ("auto", "txt", "metadata", "filename", "one", "object", "style")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of metadata.jsonl, first found

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a photo of one {}",
        "a clear photo of {}",
        "a close view of {}",
        "a snapshot of {}",
        "a sharp picture of {}",
        "a small picture of {}",
        "a well lit photo of {}",
        "a dim photo of {}",
        "a colourful photo of {}",
        "a photo showing {} from the front",
        "a photo showing {} from the side",
        "a picture with {} in the middle",
        "an everyday photo of {}",
        "an image of {}",
        "{} in a photo",
        "{} seen up close",
        "this is a photo of {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "an illustration in the style of {}",
        "a scene in the style of {}",
        "a detailed work in the style of {}",
        "a quick sketch in the style of {}",
        "a colourful image in the style of {}",
        "a dark image in the style of {}",
        "a bright image in the style of {}",
        "an artwork by the hand of {}",
        "an image made the way of {}",
    ),
}


def read_captions(folder: Path, images: Sequence[Path], mode: str, caption: str | None) -> dict[Path, tuple[str, ...]]:
    """The captions of each image, one or more, in the images' order. `mode` is one of CAPTION_MODES.

    txt        every line of 001.txt beside 001.png that is not empty
    metadata   rows {"file_name": ..., "text": ...} of metadata.jsonl; a text may be a list, a file may have several rows
    filename   the file's name up to its first dot (cloneofsimo)
    one        `caption`
    object, style    TEMPLATES with `caption` in place of {}
    auto       metadata.jsonl if there is one, else .txt files if there are any, else `caption`, else file names

    Raises UserError for an image without a caption, an unknown mode, and a `caption` that is missing or would have no effect.
    """
    if mode not in CAPTION_MODES:
        raise UserError(f"unknown caption mode {mode!r}, expected one of {', '.join(CAPTION_MODES)}")
    chosen = _detect(folder, caption) if mode == "auto" else mode
    needs_caption = chosen in ("one", "object", "style")
    if needs_caption and not (caption and caption.strip()):
        raise UserError(f"captions {chosen!r} need the caption (for templates, the word to put in them), got {caption!r}")
    if not needs_caption and caption is not None:
        raise UserError(f"the caption {caption!r} has no use when {folder} is read with captions {chosen!r}; drop it or ask for captions 'one'")
    if chosen == "one":
        return dict.fromkeys(images, (str(caption),))
    if chosen in TEMPLATES:
        return dict.fromkeys(images, tuple(t.format(caption) for t in TEMPLATES[chosen]))
    if chosen == "filename":
        return _complete({p: (p.name.split(".")[0].strip(),) for p in images}, images, "a caption in its name")
    if chosen == "metadata":
        return _complete(read_metadata(folder / "metadata.jsonl"), images, "a row in metadata.jsonl")
    return _complete({p: _read_lines(p.with_suffix(".txt")) for p in images}, images, "a .txt file with a caption")


def read_metadata(path: Path) -> dict[Path, tuple[str, ...]]:
    """The images that metadata.jsonl names, relative to its folder, with their captions; UserError for a bad row or a file that is not there."""
    if not path.is_file():
        raise UserError(f"captions 'metadata' need the file {path}, which is missing; write one JSON object per line with file_name and text")
    captions: dict[Path, tuple[str, ...]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, texts = _read_row(line, f"{path}, line {number}")
        image = path.parent / name
        if not image.is_file() or not is_image(image):
            raise UserError(f"{path}, line {number} names {name}, which is not an image in {path.parent}; correct file_name or add the image")
        captions[image] = captions.get(image, ()) + texts
    return captions


def _detect(folder: Path, caption: str | None) -> str:
    if (folder / "metadata.jsonl").is_file():
        return "metadata"
    if any(p.suffix == ".txt" for p in folder.iterdir()):
        return "txt"
    return "filename" if caption is None else "one"


def _complete(captions: Mapping[Path, tuple[str, ...]], images: Sequence[Path], what: str) -> dict[Path, tuple[str, ...]]:
    """The captions in the images' order; UserError with a count and the first name when some image has none."""
    missing = [p for p in images if not any(captions.get(p, ()))]
    if missing:
        raise UserError(f"{len(missing)} of {len(images)} images lack {what}, first {missing[0]}; add it, or choose another caption mode")
    return {p: captions[p] for p in images}


def _read_lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _read_row(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    """The file name and the captions of one row of metadata.jsonl."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write one object per line with file_name and text") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{where} has no "file_name"; write one object per line with file_name and text')
    column = next((c for c in CAPTION_COLUMNS if c in row), None)
    if column is None:
        raise UserError(f"{where} has the columns {', '.join(row)}; expected the caption under one of {', '.join(CAPTION_COLUMNS)}")
    texts = row[column] if isinstance(row[column], list) else [row[column]]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{where} has the {column} {row[column]!r}, expected a caption or a list of captions")
    return row["file_name"], tuple(t.strip() for t in texts)
