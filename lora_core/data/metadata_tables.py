"""Metadata tables of a folder of images: metadata.jsonl and metadata.csv (ImageFolder of the
datasets library), with file names and captions.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.listing import INDEXED_CAPTIONS, find_file, image_index
from lora_core.errors import UserError
from lora_core.text import LONGEST_TABLE, parse_json, read_text, shorten_value

CAPTION_COLUMNS = ("text", "caption", "prompt")  # of a table; the first that exists is used


def read_metadata(
    path: Path,
    column: str | None = None,
    *,
    may_be_empty: bool = False,
    missing: dict[Path, str] | None = None,
) -> dict[Path, tuple[str, ...]]:
    """Image -> captions, from metadata.jsonl or metadata.csv (see `read_image_table`), or from
    lora_ppim's caption.txt, whose line N, counted from 0, is the caption of N.src.jpg.
    """
    if path.name == INDEXED_CAPTIONS:
        return _read_indexed(path)
    rows = read_image_table(
        path, ("file_name",), column, may_be_empty=may_be_empty, missing=missing
    )
    return {image: texts for (image,), texts in rows.items()}


def _read_indexed(path: Path) -> dict[Path, tuple[str, ...]]:
    """Image -> its line of caption.txt. Raises UserError for an image without a line."""
    lines = read_text(path, LONGEST_TABLE).split("\n")
    found: dict[Path, tuple[str, ...]] = {}
    for image in sorted(path.parent.iterdir()):
        index = image_index(image)
        if index is None or image.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        text = lines[index].strip() if index < len(lines) else ""
        if not text:
            raise UserError(
                f"{path} has no text in its line {index + 1}, the caption of {image.name}; write "
                "a line for each image, counted from 0"
            )
        found[image] = (text,)
    return found


def read_image_table(
    path: Path,
    names: Sequence[str],
    column: str | None = None,
    *,
    may_be_empty: bool = False,
    missing: dict[Path, str] | None = None,
) -> dict[tuple[Path, ...], tuple[str, ...]]:
    """The images of each row of a metadata table -> their captions.

    `names` are the columns with file names. These are relative to the table's folder and lead to
    files in it (`find_file`); table and disk may use different Unicode normal forms. Rows with the
    same images add their captions up. Rows with a missing image are left out, and added to
    `missing` with the reason, where that is given. Raises UserError for a bad row, a missing
    column, otherwise a missing image and, unless `may_be_empty`, an empty caption.
    """
    if not path.is_file():
        raise UserError(
            f"captions 'metadata' need the file {path}, which is missing; "
            f"write one JSON object per line with {', '.join(names)} and text"
        )
    captions: dict[tuple[Path, ...], tuple[str, ...]] = {}
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    for where, row in rows:
        texts = _read_row(row, names, column, where, may_be_empty=may_be_empty)
        try:
            images = tuple(
                _find_image(path.parent, row[name], f"{where} names", name) for name in names
            )
        except UserError:
            if missing is None:
                raise
            file = path.parent / row[names[0]]
            missing[file] = f"{where} names it, and it is no image in that folder or below it"
            continue
        captions[images] = captions.get(images, ()) + texts
    return captions


def _find_image(folder: Path, file: str, where: str, column: str) -> Path:
    image = find_file(folder, file)
    is_image = image is not None and image.suffix.lower() in IMAGE_SUFFIXES
    if image is None or not is_image or image.name.startswith("."):
        raise UserError(
            f"{where} {file}, which is not an image in {folder} or below it; "
            f"correct {column} or add the image"
        )
    return image


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line for errors, row) of a JSON table."""
    advice = "write one object per line with file_name and text"
    lines = read_text(path, LONGEST_TABLE).split("\n")  # not splitlines: JSON texts may hold U+2028
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, parse_json(line, where, advice)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line for errors, row) of a CSV table.

    For a quoted text over several lines the last one is named.
    """
    text = io.StringIO(read_text(path, LONGEST_TABLE), newline="")
    reader = csv.DictReader(text, restkey="(columns without a name)", strict=True)
    try:
        yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
    except csv.Error as error:
        raise UserError(
            f"{path} is not CSV ({error} after line {reader.line_num}); "
            "write a head with file_name and text, then a line per image"
        ) from error


def _read_row(
    row: Any, names: Sequence[str], column: str | None, where: str, *, may_be_empty: bool
) -> tuple[str, ...]:
    """The captions of one row of a metadata table, which has a file name in each of `names`."""
    for name in names:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            continue
        has = f", but {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        needed = f"{', '.join(names)} and a caption such as text"
        raise UserError(f'{where} has no "{name}"{has}; each row needs {needed}')
    expected = (column,) if column else CAPTION_COLUMNS
    found = next((name for name in expected if name in row), None)
    if found is None:
        names = repr(column) if column else f"one of {', '.join(CAPTION_COLUMNS)}"
        raise UserError(
            f"{where} has the columns {', '.join(row)}; expected the caption under {names}"
        )
    texts = row[found] if isinstance(row[found], list) else [row[found]]
    if may_be_empty and (not texts or row[found] is None):
        return ()
    are_texts = all(isinstance(text, str) for text in texts)
    captions = tuple(text.strip() for text in texts if text.strip()) if are_texts else ()
    is_complete = bool(texts) and len(captions) == len(texts)
    if not are_texts or not (is_complete or may_be_empty):
        raise UserError(
            f"{where} has the {found} {shorten_value(row[found])}, "
            "expected a caption or a list of captions"
        )
    return captions
