"""Captions of a folder of images: text files, a metadata table, file names, one for all, or
templates.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_core.data.file_names import looks_like_caption
from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.listing import (
    CAPTION_SUFFIXES,
    METADATA_TABLES,
    NO_IMAGE,
    FolderContents,
    find_file,
)
from lora_core.errors import UserError, printable
from lora_core.text import normalize_unicode, parse_json, read_lines, read_text

CaptionMode = Literal["auto", "txt", "metadata", "filename", "one", "object", "style"]
CAPTION_MODES = ("auto", "txt", "metadata", "filename", "one", "object", "style")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of a table, first found
OTHER_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")  # somebody's captions, perhaps
ONE_FOR_ALL = ("one", "object", "style")  # modes that need the caption
ONE = "the one caption of --data.caption"
FALLBACK = "--data.caption, where an image has no text of its own"
TEMPLATE = "sentence templates with --data.caption"
FILE_NAME = "file names"
FOLDER_NAME = "the folder's name"

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


class Captions(NamedTuple):
    """The captions of one image."""

    texts: tuple[str, ...]
    source: Path | str  # the file that they are from, or in words


def read_captions(
    parts: Sequence[FolderContents],
    mode: str,
    caption: str | None,
    column: str | None = None,
    *,
    must_use: bool = True,
) -> dict[Path, Captions]:
    """The captions of each image, one or more, in the images' order. `mode` is one of
    CAPTION_MODES.

    txt        every line of 001.txt beside 001.png that is not empty
    metadata   rows {"file_name": ..., "text": ...} of metadata.jsonl, or metadata.csv with such a head; `column` names
               another column than text, caption or prompt; in JSON a text may be a list; a file may have several rows
    filename   the file's name up to its first dot (cloneofsimo)
    one        `caption`
    object, style    TEMPLATES with `caption` in place of {}
    auto       the metadata table if there is one, else files beside the images if one of them has a text (.txt, else .caption,
               else a .json with text, caption or prompt), else `caption`, else the words of a folder called N_words (kohya),
               else file names where somebody wrote them (`is_caption`)

    An image without a text in its file or table takes `caption` where that is given, else the words
    of such a folder. All texts are in Unicode's normal form C. Raises UserError for an image
    without a caption, an unknown mode, a `caption` or `column` that is missing, and, if it
    `must_use` them, for one that no image takes.
    """
    if mode not in CAPTION_MODES:
        raise UserError(
            f"unknown caption mode {mode!r}, expected one of {', '.join(CAPTION_MODES)}"
        )
    modes = {part.folder: _detect(part, caption) if mode == "auto" else mode for part in parts}
    if (first := next(iter(modes.values()))) in ONE_FOR_ALL and not (caption and caption.strip()):
        raise UserError(
            f"captions {first!r} need the caption (for templates, the word to put in them), got "
            f"{caption!r}; add --data.caption"
        )
    found: dict[Path, Captions] = {}
    for part in parts:
        own = _read_part(
            part,
            modes[part.folder],
            caption,
            column,
            suffixes=CAPTION_SUFFIXES if mode == "auto" else (".txt",),
        )
        needed = {"txt": "a .txt file with a caption", "metadata": f"a row in {_table(part).name}"}
        found |= _complete(
            own, part, needed.get(modes[part.folder], "a caption in its name"), caption
        )
    if must_use:
        _check_use(
            {captions.source for captions in found.values()},
            f"{parts[0].folder} is read with captions {first!r}",
            caption,
            column,
        )
    for image, (texts, source) in found.items():
        check_texts(texts, f"the caption of {image.name} from {source}")
    return {
        image: Captions(tuple(map(normalize_unicode, texts)), source)
        for image, (texts, source) in found.items()
    }


def check_texts(texts: Sequence[str], name: str) -> None:
    """Raises UserError for a zero byte or half a character (\\ud83d), which JSON can write and no
    tokenizer reads.
    """
    for text in texts:
        if "\0" in text or printable(text) != text:
            raise UserError(f"{name} has a zero byte or half a character: {text!a}; correct it")


def read_metadata(
    path: Path, column: str | None = None, *, may_be_empty: bool = False
) -> dict[Path, tuple[str, ...]]:
    """The images that metadata.jsonl or metadata.csv names, relative to its folder, with their
    captions.

    A file is found in whichever normal form of Unicode the table and the disk write its name.
    Raises UserError for a bad row, a column that is not there, an image that is not there and,
    unless it `may_be_empty`, an empty caption.
    """
    if not path.is_file():
        raise UserError(
            f"captions 'metadata' need the file {path}, which is missing; "
            "write one JSON object per line with file_name and text"
        )
    captions: dict[Path, tuple[str, ...]] = {}
    for where, row in _csv_rows(path) if path.suffix == ".csv" else _json_rows(path):
        name, texts = _read_row(row, column, where, may_be_empty=may_be_empty)
        image = find_file(path.parent, name)
        if (
            image is None
            or image.suffix.lower() not in IMAGE_SUFFIXES
            or image.name.startswith(".")
        ):
            raise UserError(
                f"{where} names {name}, which is not an image in {path.parent}; "
                "correct file_name or add the image"
            )
        captions[image] = captions.get(image, ()) + texts
    return captions


def _check_use(sources: set[Path | str], how: str, caption: str | None, column: str | None) -> None:
    """Raises UserError for a `caption` or a `column` of tables that no image takes."""
    if caption is not None and not sources & {ONE, FALLBACK, TEMPLATE}:
        raise UserError(
            f"the caption {caption!r} has no use when {how}; "
            "leave it out or add --data.captions one"
        )
    if column and not any(
        isinstance(source, Path) and source.name in METADATA_TABLES for source in sources
    ):
        raise UserError(
            f"the caption column {column!r} has no use when {how}; "
            "leave it out or add metadata.jsonl"
        )


def _detect(part: FolderContents, caption: str | None) -> str:
    """The mode that auto stands for."""
    if part.table is not None:
        return "metadata"
    if any(_read_beside(path) for own in part.texts.values() for path in own):
        return "txt"
    if caption is not None:
        return "one"
    if part.words:
        return "folder"
    unwritten = [image for image in part.images if not looks_like_caption(_name_of(image))]
    if unwritten:
        first = unwritten[0]
        unread = _unread_texts(part)
        lacking = (
            f"{len(unwritten)} of {len(part.images)} images in {part.folder} have no caption but a "
            "name that says nothing"
        )
        ways = (
            f"write captions in files such as {first.stem}.txt, give one for all with "
            "--data.caption"
        )
        raise UserError(
            f"{lacking}, first {first.name}{unread}; {ways}, or take the names with "
            "--data.captions filename"
        )
    return "filename"


def _unread_texts(part: FolderContents) -> str:
    """What is in the folder that may be meant as captions and is not read, in brackets."""
    without = [
        path.name
        for own in part.texts.values()
        for path in own
        if path.suffix.lower() == ".json" and path.read_bytes().strip()
    ]
    strays = [
        path.name
        for path, why in part.others.items()
        if why == NO_IMAGE or path.suffix.lower() in OTHER_TABLES
    ]
    found = [f"{', '.join(without[:3])} has no {', '.join(CAPTION_COLUMNS)}"] if without else []
    found += [f"{', '.join(strays[:3])} there belongs to no image"] if strays else []
    return f" ({'; '.join(found)})" if found else ""


def _read_part(
    part: FolderContents,
    chosen: str,
    caption: str | None,
    column: str | None,
    *,
    suffixes: Sequence[str],
) -> dict[Path, Captions]:
    """The captions that one folder has, of those images that have one."""
    if chosen == "one":
        return dict.fromkeys(part.images, Captions((str(caption),), ONE))
    if chosen in TEMPLATES:
        return dict.fromkeys(
            part.images, Captions(tuple(t.format(caption) for t in TEMPLATES[chosen]), TEMPLATE)
        )
    if chosen == "folder":
        return dict.fromkeys(
            part.images, Captions((_checked(part.words, part.folder),), FOLDER_NAME)
        )
    if chosen == "filename":
        return {
            image: Captions((_checked(_name_of(image), image),), FILE_NAME) for image in part.images
        }
    if chosen == "metadata":
        table = _table(part)
        read = read_metadata(table, column, may_be_empty=caption is not None)
        return {image: Captions(texts, table) for image, texts in read.items()}
    found = {}
    for image, own in part.texts.items():
        for path in own:
            texts = _read_beside(path) if path.suffix.lower() in suffixes else ()
            if texts and image not in found:
                found[image] = Captions(texts, path)
    return found


def _complete(
    own: Mapping[Path, Captions], part: FolderContents, what: str, caption: str | None
) -> dict[Path, Captions]:
    """The captions of a folder in the images' order; UserError with a count and the first name when
    some image has none.
    """
    missing = [image for image in part.images if image not in own or not any(own[image].texts)]
    spare = (
        Captions((caption,), FALLBACK)
        if caption and caption.strip()
        else Captions((part.words,), FOLDER_NAME)
    )
    if missing and not spare.texts[0]:
        advice = "add it, give --data.caption for those without, or choose other --data.captions"
        beside = ", ".join(path.name for path in part.texts.get(missing[0], ()))
        first = f"{missing[0]}, beside which is {beside}" if beside else str(missing[0])
        raise UserError(
            f"{len(missing)} of {len(part.images)} images lack {what}, first {first}; {advice}"
        )
    return {image: spare if image in missing else own[image] for image in part.images}


def _table(part: FolderContents) -> Path:
    return part.table or part.folder / METADATA_TABLES[0]


def _name_of(image: Path) -> str:
    return image.name.split(".")[0].strip()


def _checked(words: str, path: Path) -> str:
    """The words of a file's or folder's name; UserError where they are no Unicode."""
    if printable(words) != words:
        raise UserError(
            f"the name of {path} has bytes that are no UTF-8 and cannot be a caption; "
            "rename it, or choose other --data.captions"
        )
    return words


def _read_beside(path: Path) -> tuple[str, ...]:
    """The captions in a file beside an image; none in an empty one and in JSON without text,
    caption or prompt.

    A .json of one line that is no JSON is read as its text.
    """
    lines = read_lines(path)
    if path.suffix.lower() != ".json" or (len(lines) == 1 and lines[0][0] not in '{["'):
        return tuple(lines)
    value = parse_json(read_text(path), str(path), "correct it or remove it") if lines else None
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTION_COLUMNS if value.get(name)), None)
    texts: list[Any] = value if isinstance(value, list) else [value]
    return (
        tuple(t.strip() for t in texts if t.strip())
        if all(isinstance(t, str) for t in texts)
        else ()
    )


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row is, for errors, and the row."""
    for number, line in enumerate(
        read_text(path).split("\n"), start=1
    ):  # not splitlines: JSON texts may hold U+2028
        where = f"{path}, line {number}"
        if line.strip():
            yield (
                where,
                parse_json(line, where, "write one object per line with file_name and text"),
            )


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The same; quoted texts may go over several lines, of which the last is named."""
    reader = csv.DictReader(
        io.StringIO(read_text(path), newline=""), restkey="(columns without a name)", strict=True
    )
    try:
        yield from ((f"{path}, line {reader.line_num}", row) for row in reader)
    except csv.Error as error:
        raise UserError(
            f"{path} is not CSV ({error} after line {reader.line_num}); "
            "write a head with file_name and text, then a line per image"
        ) from error


def _read_row(
    row: Any, column: str | None, where: str, *, may_be_empty: bool
) -> tuple[str, tuple[str, ...]]:
    """The file name and the captions of one row of a metadata table."""
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        has = f", but {', '.join(map(str, row))}" if isinstance(row, dict) and row else ""
        raise UserError(
            f'{where} has no "file_name"{has}; each row needs file_name and a caption such as text'
        )
    expected = (column,) if column else CAPTION_COLUMNS
    found = next((c for c in expected if c in row), None)
    if found is None:
        names = repr(column) if column else f"one of {', '.join(CAPTION_COLUMNS)}"
        raise UserError(
            f"{where} has the columns {', '.join(row)}; expected the caption under {names}"
        )
    texts = row[found] if isinstance(row[found], list) else [row[found]]
    if may_be_empty and (not texts or row[found] is None):
        return row["file_name"], ()
    if may_be_empty and all(isinstance(t, str) for t in texts):
        return row["file_name"], tuple(t.strip() for t in texts if t.strip())
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(
            f"{where} has the {found} {row[found]!r}, expected a caption or a list of captions"
        )
    return row["file_name"], tuple(t.strip() for t in texts)
