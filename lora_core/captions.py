"""Captions of a folder of images: text files, a metadata table, file names, one for all, or templates."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lora_core.errors import UserError
from lora_core.images import is_image

CaptionMode = Literal["auto", "txt", "metadata", "filename", "one", "object", "style"]
CAPTION_MODES = ("auto", "txt", "metadata", "filename", "one", "object", "style")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of a table, first found
TABLES = ("metadata.jsonl", "metadata.csv")  # as ImageFolder of the datasets library has them

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


def read_captions(folder: Path, images: Sequence[Path], mode: str, caption: str | None, column: str | None = None) -> dict[Path, tuple[str, ...]]:
    """The captions of each image, one or more, in the images' order. `mode` is one of CAPTION_MODES.

    txt        every line of 001.txt beside 001.png that is not empty
    metadata   rows {"file_name": ..., "text": ...} of metadata.jsonl, or metadata.csv with such a head; `column` names another column than text,
               caption or prompt; in JSON a text may be a list; a file may have several rows
    filename   the file's name up to its first dot (cloneofsimo)
    one        `caption`
    object, style    TEMPLATES with `caption` in place of {}
    auto       the metadata table if there is one, else .txt files if there are any, else `caption`, else file names

    Raises UserError for an image without a caption, an unknown mode, and a `caption` or `column` that is missing or would have no effect.
    """
    if mode not in CAPTION_MODES:
        raise UserError(f"unknown caption mode {mode!r}, expected one of {', '.join(CAPTION_MODES)}")
    chosen = _detect(folder, caption) if mode == "auto" else mode
    needs_caption = chosen in ("one", "object", "style")
    if needs_caption and not (caption and caption.strip()):
        raise UserError(f"captions {chosen!r} need the caption (for templates, the word to put in them), got {caption!r}; add --data.caption")
    if not needs_caption and caption is not None:
        raise UserError(f"the caption {caption!r} has no use when {folder} is read with captions {chosen!r}; leave it out or add --data.captions one")
    if column and chosen != "metadata":
        raise UserError(
            f"the caption column {column!r} has no use when {folder} is read with captions {chosen!r}; leave it out or add metadata.jsonl"
        )
    if chosen == "one":
        return dict.fromkeys(images, (str(caption),))
    if chosen in TEMPLATES:
        return dict.fromkeys(images, tuple(t.format(caption) for t in TEMPLATES[chosen]))
    if chosen == "filename":
        return _complete({p: (p.name.split(".")[0].strip(),) for p in images}, images, "a caption in its name")
    if chosen == "metadata":
        table = metadata_table(folder) or folder / TABLES[0]
        return _complete(read_metadata(table, column), images, f"a row in {table.name}")
    return _complete({p: _read_lines(p.with_suffix(".txt")) for p in images}, images, "a .txt file with a caption")


def metadata_table(folder: Path) -> Path | None:
    """The folder's metadata.jsonl or metadata.csv, None without either; UserError when there are both."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {' and '.join(TABLES)}; keep one of them")
    return found[0] if found else None


def read_metadata(path: Path, column: str | None = None) -> dict[Path, tuple[str, ...]]:
    """The images that metadata.jsonl or metadata.csv names, relative to its folder, with their captions.

    Raises UserError for a bad row, a column that is not there and an image that is not there.
    """
    if not path.is_file():
        raise UserError(f"captions 'metadata' need the file {path}, which is missing; write one JSON object per line with file_name and text")
    captions: dict[Path, tuple[str, ...]] = {}
    for where, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
        name, texts = _read_row(row, column, where)
        image = path.parent / name
        if not image.is_file() or not is_image(image):
            raise UserError(f"{where} names {name}, which is not an image in {path.parent}; correct file_name or add the image")
        captions[image] = captions.get(image, ()) + texts
    return captions


def _detect(folder: Path, caption: str | None) -> str:
    if metadata_table(folder):
        return "metadata"
    if any(p.suffix == ".txt" for p in folder.iterdir()):
        return "txt"
    return "filename" if caption is None else "one"


def _complete(captions: Mapping[Path, tuple[str, ...]], images: Sequence[Path], what: str) -> dict[Path, tuple[str, ...]]:
    """The captions in the images' order; UserError with a count and the first name when some image has none."""
    missing = [p for p in images if not any(captions.get(p, ()))]
    if missing:
        raise UserError(f"{len(missing)} of {len(images)} images lack {what}, first {missing[0]}; add it, or choose other --data.captions")
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


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row is, for errors, and the row."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines: JSON texts may hold U+2028
        where = f"{path}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg}); write one object per line with file_name and text") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The same; quoted texts may go over several lines, of which the last is named."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), restkey="(columns without a name)", strict=True)
    try:
        yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
    except csv.Error as error:
        raise UserError(
            f"{path} is not CSV ({error} after line {reader.line_num}); write a head with file_name and text, then a line per image"
        ) from error


def _read_row(row: Any, column: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    """The file name and the captions of one row of a metadata table."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{where} has no "file_name"; each row needs file_name and a caption such as text')
    expected = (column,) if column else CAPTION_COLUMNS
    found = next((c for c in expected if c in row), None)
    if found is None:
        names = repr(column) if column else f"one of {', '.join(CAPTION_COLUMNS)}"
        raise UserError(f"{where} has the columns {', '.join(row)}; expected the caption under {names}")
    texts = row[found] if isinstance(row[found], list) else [row[found]]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{where} has the {found} {row[found]!r}, expected a caption or a list of captions")
    return row["file_name"], tuple(t.strip() for t in texts)
