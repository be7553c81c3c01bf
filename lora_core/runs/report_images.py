"""The images of a run for a page: cut from its sheets, re-encoded as JPEG, bounded in bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lora_core.data.images import READ_ERRORS, decode_image
from lora_core.errors import UserError
from lora_core.json_files import INTEGER, parse_object
from lora_core.runs.pictures import CELLS, OVER_STEPS
from lora_core.runs.report_charts import shorten_text
from lora_core.text import hide_home

MOST_BYTES = 6_000_000  # of all images of a page, as the page holds them; a page has 10 MB at most
QUALITY = 88  # of the JPEGs
LONGEST_SIDE = 256  # pixels of an image on the page; sheets have 192
WIDEST_SHEET = 1000  # pixels of a sheet that is shown whole
MOST_SHEETS = 40  # steps of a slider
LONGEST_PROMPT = 400  # characters under an image


class SheetImage(NamedTuple):
    """An image of a sheet as a page shows it."""

    source: str  # data:image/jpeg;base64,...
    width: int
    height: int
    caption: str  # the prompt, as the sheet shows it
    role: str  # sample, base, tokens, after, new, training; sheet: a sheet as a whole
    strength: float | None
    label: str


@dataclass(frozen=True)
class Sheet:
    """A sheet of images after a number of steps."""

    step: int
    images: tuple[SheetImage, ...]


@dataclass(frozen=True)
class RunImages:
    """The images of a run."""

    samples: tuple[Sheet, ...] = ()  # in order of their steps
    before_after: tuple[SheetImage, ...] = ()
    over_steps: SheetImage | None = None  # the sheet as a whole
    notes: tuple[str, ...] = ()  # sentences about what is missing or left out

    def with_role(self, role: str) -> list[SheetImage]:
        """The images of before_after.png that are of that kind."""
        return [image for image in self.before_after if image.role == role]


def read_images(
    folder: Path,
    *,
    shows_data: bool,
    card: str = "",
    last_only: bool = False,
    most_bytes: int = MOST_BYTES,
) -> RunImages:
    """The images in a run's samples/ and before_after.png, with at most `most_bytes`.

    Training images need `shows_data`. Sheets that only the owner of the run may see are left out,
    and those of older versions, which do not say where their images are, are shown as a whole where
    the model card (`card`) shows them.
    """
    notes: list[str] = []
    older = card if "](samples/" in card or "](before_after.png)" in card else ""
    read = _SheetReader(shows_data, bool(older), notes)
    paths = sorted((folder / "samples").glob("step_*.png"))
    if not paths:
        notes.append("There are no sample sheets yet.")
    whole = read(folder / "before_after.png")
    before_after = whole.images if whole else ()
    left = most_bytes - _count_bytes(before_after)
    if left < 0:
        notes.append("before_after.png is too large for this page: it lies in the run's folder.")
        before_after, left = (), most_bytes
    over_steps = None
    if not last_only and len(paths) > 1:
        over_steps = read.whole_sheet(folder / "samples" / OVER_STEPS)
        left -= len(over_steps.source) if over_steps else 0
    if last_only:
        paths = paths[-1:]
    kept = evenly_chosen(paths, MOST_SHEETS)
    sheets = _fit_sheets([sheet for sheet in map(read, kept) if sheet], left)
    if 0 < len(sheets) < len(paths):
        notes.append(
            f"{len(sheets)} of {len(paths)} sample sheets are shown, evenly chosen, to bound the "
            "size of this page; the others are in samples/."
        )
    elif read.found and not sheets and paths:
        notes.append("The sample sheets are too large for this page: they are in samples/.")
    return RunImages(tuple(sheets), before_after, over_steps, tuple(dict.fromkeys(notes)))


def evenly_chosen(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items in order, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[-1:])[:most]
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    return [items[place] for place in places]


def _fit_sheets(sheets: list[Sheet], most_bytes: int) -> list[Sheet]:
    """The sheets, or every second of them and so on, that fit; the last one goes last."""
    while sheets and sum(_count_bytes(sheet.images) for sheet in sheets) > most_bytes:
        sheets = evenly_chosen(sheets, len(sheets) // 2)
    return sheets


def _count_bytes(images: Iterable[SheetImage]) -> int:
    return sum(len(image.source) for image in images)


# ---------------------------------------------------------------- one sheet


@dataclass
class _SheetReader:
    """Reads a sheet's images; what cannot be shown is a sentence in `notes`."""

    shows_data: bool
    shows_older: bool  # whether sheets of older versions are shown, as a whole
    notes: list[str]
    found: int = 0

    def __call__(self, path: Path) -> Sheet | None:
        if not path.is_file():
            return None
        name = path.name
        try:
            sheet = decode_image(path)
        except READ_ERRORS as error:
            self.notes.append(f"{name} cannot be read ({hide_home(str(error))}).")
            return None
        text = sheet.info.get(CELLS)
        if text is None:
            return self._older(sheet, path)
        try:
            facts = parse_object(str(text), f"the list of images in {name}", "", {"step": INTEGER})
            cells = [_checked(cell, sheet, name) for cell in facts.get("cells", [])]
        except (UserError, TypeError) as error:
            self.notes.append(f"{hide_home(str(error)).rstrip('; ')}.")
            return None
        if facts.get("private") is not False and not self.shows_data:
            self.notes.append(
                "Its images are left out: those of an inpainting model have the surroundings of "
                "validation images, which --samples.show-data would show."
            )
            return None
        wanted = [c for c in cells if c["role"] != "training" or self.shows_data]
        images = [_cut(sheet, cell) for cell in wanted]
        self.found += 1
        return Sheet(facts["step"], tuple(images))

    def whole_sheet(self, path: Path) -> SheetImage | None:
        """A sheet as one image, where each of its images may be shown and it is no larger than a
        quarter of MOST_BYTES.
        """
        if self(path) is None:
            return None
        source, width, height = encode_image(decode_image(path), WIDEST_SHEET)
        if len(source) > MOST_BYTES // 4:
            return None
        return SheetImage(source, width, height, path.name, "sheet", None, "")

    def _older(self, sheet: Image.Image, path: Path) -> Sheet | None:
        """A sheet that does not say where its images are."""
        digits = path.stem.removeprefix("step_")
        step = int(digits) if digits.isdigit() else 0
        if not self.shows_older:
            self.notes.append(
                "Its sheets are of an older version, which does not say what is on them: they are "
                "in samples/ and before_after.png."
            )
            return None
        self.notes.append("Its sheets are of an older version and shown as a whole.")
        source, width, height = encode_image(sheet, WIDEST_SHEET)
        self.found += 1
        return Sheet(step, (SheetImage(source, width, height, path.name, "sheet", None, ""),))


def _checked(cell: Any, sheet: Image.Image, name: str) -> dict[str, Any]:
    """The cell, if it is one. Raises UserError for a place outside of the sheet, and others."""
    box = cell.get("box") if isinstance(cell, dict) else None
    if not _lies_on(box, sheet):
        raise UserError(f"{name} has an image at {box}, which is no place on it")
    strength = cell.get("strength")
    is_number = isinstance(strength, int | float) and not isinstance(strength, bool)
    texts = {key: str(cell.get(key, "")) for key in ("caption", "role", "label")}
    return {"box": box, "strength": float(strength) if is_number else None, **texts}


def _lies_on(box: Any, sheet: Image.Image) -> bool:
    """Whether it is left, top, right and bottom of a part of the sheet."""
    if not isinstance(box, list) or len(box) != 4 or any(type(n) is not int for n in box):
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= sheet.width and 0 <= top < bottom <= sheet.height


def _cut(sheet: Image.Image, cell: dict[str, Any]) -> SheetImage:
    source, width, height = encode_image(sheet.crop(cell["box"]), LONGEST_SIDE)
    caption = shorten_text(cell["caption"], LONGEST_PROMPT)
    return SheetImage(source, width, height, caption, cell["role"], cell["strength"], cell["label"])


def encode_image(image: Image.Image, longest: int) -> tuple[str, int, int]:
    """(address of a JPEG, width, height), scaled down to `longest` pixels, without metadata."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    code = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{code}", image.width, image.height
