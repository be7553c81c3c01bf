"""The sections of a page: settings, images, tokens and files, as the template shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.byte_sizes import format_bytes
from lora_core.runs.report_card import FILES, Block, Words, card_sections, describe_files
from lora_core.runs.report_charts import format_number, shorten_text
from lora_core.runs.report_data import NO_DEFAULT, PAGE, ChangedOption, RunRecord
from lora_core.runs.report_images import RunImages, SheetImage
from lora_core.runs.report_metrics import RunStyle

BASE = "base model"
STRIPS = {  # role of images of before_after.png -> title
    "new": "Further prompts, after training",
    "tokens": "The learned tokens alone, after training",
    "sheet": "before_after.png",  # of an older version
}
LONGEST_VALUE = 300  # characters of a setting


@dataclass(frozen=True)
class Frame:
    """The images of a position and a strength of the sliders."""

    position: int
    strength: int
    images: tuple[SheetImage, ...]
    words: str
    is_shown: bool
    is_whole: bool  # a sheet of an older version


@dataclass(frozen=True)
class Viewer:
    """Images over steps and strengths, which two sliders choose."""

    positions: tuple[str, ...] = ()  # "base model", "step 20" ...
    strengths: tuple[str, ...] = ()  # "0.5", "1"
    frames: tuple[Frame, ...] = ()
    start: int = 0  # the strength that is shown first
    words: Mapping[str, Any] | None = None  # for the script


class CardPart(NamedTuple):
    """A section of the model card; blocks of one kind in a row are together."""

    title: str
    grouped: list[tuple[str, list[Block]]]


class FileRow(NamedTuple):
    """A file or folder of a run."""

    name: str
    size: str
    words: tuple[Words, ...]  # what the model card says about it


@dataclass(frozen=True)
class RunPart:
    """A run as the template shows it."""

    record: RunRecord
    style: RunStyle
    steps: str
    before: str
    after: str
    change: str
    size: str
    viewer: Viewer
    strips: list[tuple[str, list[SheetImage]]]
    training: list[SheetImage]
    image_notes: tuple[str, ...]
    data_words: str
    tokens: list[dict[str, Any]]
    token_words: str
    files: list[FileRow]
    card: list[CardPart]


def describe_run_part(record: RunRecord, images: RunImages, style: RunStyle) -> RunPart:
    """The run as the template shows it."""
    before, after = (_number(record.summary.get(f"val_loss_{k}")) for k in ("before", "after"))
    if before is None and len(record.metrics.get("val_loss", ([], []))[1]) > 1:
        values = record.metrics["val_loss"][1]
        before, after = values[0], values[-1]
    done, steps = record.steps_done, record.steps
    files = list_files(record.folder)
    return RunPart(
        record=record,
        style=style,
        steps=f"{done:,}" if done >= steps else f"{done:,} of {steps:,}",
        before="none" if before is None else f"{before:.5f}",
        after="none" if after is None else f"{after:.5f}",
        change="none" if not before or after is None else f"{after / before - 1:+.1%}",
        size=format_bytes(sum(size for _, size in files)),
        viewer=make_viewer(images),
        strips=_image_strips(images),
        training=images.with_role("training"),
        image_notes=images.notes,
        data_words=_describe_data(record, images),
        tokens=_token_rows(record),
        token_words=_missing_tokens(record),
        files=_file_rows(files, record.card),
        card=_card_parts(record.card),
    )


def _image_strips(images: RunImages) -> list[tuple[str, list[SheetImage]]]:
    """(title, images) below the viewer: the sheet over the steps, and more of before_after.png."""
    strips = [("Over the steps", [images.over_steps])] if images.over_steps else []
    for role, title in STRIPS.items():
        if own := images.with_role(role):
            strips.append((title, own))
    return strips


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# ---------------------------------------------------------------- settings


def differing_settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(option, its value in each run) of the settings in which runs differ."""
    tables = [{own.name: own for own in record.settings} for record in records]
    names = dict.fromkeys(chain.from_iterable(tables))
    rows = []
    for name in names:
        default = next(table[name].default for table in tables if name in table)
        usual = "" if default == NO_DEFAULT else default
        values = [table[name].value if name in table else usual for table in tables]
        values = [shorten_text(value, LONGEST_VALUE) for value in values]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


def common_settings(records: Sequence[RunRecord]) -> list[ChangedOption]:
    """The settings that all runs have."""
    others = [set(record.settings) for record in records[1:]]
    first = records[0].settings
    return [
        own._replace(value=shorten_text(own.value, LONGEST_VALUE))
        for own in first
        if all(own in settings for settings in others)
    ]


# ---------------------------------------------------------------- images


def make_viewer(images: RunImages) -> Viewer:
    """The frames of the sliders: the base model's images first, then each sheet of samples, its
    rows by strength.
    """
    groups: list[tuple[str, dict[float, list[SheetImage]]]] = []
    base = images.with_role("base")
    for sheet in images.samples:
        by_strength: dict[float, list[SheetImage]] = {}
        for image in sheet.images:
            by_strength.setdefault(1.0 if image.strength is None else image.strength, []).append(
                image
            )
        groups.append((f"step {sheet.step:,}", by_strength))
    if after := images.with_role("after"):
        if not groups:
            groups.append(("after training", {}))
        groups[-1][1].setdefault(1.0, after)  # where --samples.strengths has no 1
    strengths = sorted(set(chain.from_iterable(own for _, own in groups)))
    if base and strengths:
        groups.insert(0, (BASE, {strengths[-1]: base}))
    if not groups:
        return Viewer()
    return _lay_out(groups, strengths)


def _lay_out(
    groups: Sequence[tuple[str, dict[float, list[SheetImage]]]], strengths: Sequence[float]
) -> Viewer:
    start = strengths.index(1.0) if 1.0 in strengths else len(strengths) - 1
    names = [f"{strength:g}" for strength in strengths]
    frames, held, other = [], [], []
    for position, (name, by_strength) in enumerate(groups):
        own = [strengths.index(strength) for strength in sorted(by_strength)]
        held.append(own)
        has_none = name == BASE
        other.append("none: it has no adapters" if has_none else f"drawn at {names[own[-1]]} only")
        shown = start if start in own else own[-1]
        for place in own:
            images = tuple(by_strength[strengths[place]])
            frames.append(
                Frame(
                    position,
                    place,
                    images,
                    name if has_none else f"{name}, strength {names[place]}",
                    is_shown=position == len(groups) - 1 and place == shown,
                    is_whole=images[0].role == "sheet",
                )
            )
        if has_none:  # whatever the strength
            held[-1] = [-1]
            frames[-1] = Frame(position, -1, frames[-1].images, name, frames[-1].is_shown, False)
    positions = tuple(name for name, _ in groups)
    words = {"positions": positions, "strengths": names, "held": held, "other": other}
    return Viewer(positions, tuple(names), tuple(frames), start, words)


def last_samples(images: RunImages) -> tuple[str, list[SheetImage]]:
    """(step and strength in words, the images) of the last sheet, at the strength nearest to 1."""
    viewer = make_viewer(images)
    shown = [frame for frame in viewer.frames if frame.is_shown]
    return (shown[0].words, list(shown[0].images)) if shown else ("", [])


class DataPart(NamedTuple):
    """The training images of the runs that have the same ones."""

    runs: list[RunPart]
    words: str
    images: list[SheetImage]


def data_parts(runs: Sequence[RunPart]) -> list[DataPart]:
    """The training images of the runs, the same ones once."""
    parts: dict[tuple[str, ...], DataPart] = {}
    for run in runs:
        key = (run.data_words, *(image.source for image in run.training))
        parts.setdefault(key, DataPart([], run.data_words, run.training)).runs.append(run)
    return list(parts.values())


def _describe_data(record: RunRecord, images: RunImages) -> str:
    """The number of training images, and why they are shown or not."""
    count = record.summary.get("images")
    if not isinstance(count, int):
        words = "The number of its training images is written at the end of a run."
        if record.is_finished:
            words = "This version of a run did not record the number of its training images."
    else:
        words = f"{count} image{'s' * (count != 1)}."
    if shown := len(images.with_role("training")):
        return words if shown == count else f"{words} The first {shown} are shown."
    if images.with_role("sheet"):
        return f"{words} The first of them are in before_after.png, below."
    if record.shows_data:
        return f"{words} They are shown once before_after.png has them."
    return f"{words} Neither they nor captions from files are shown (--samples.show-data)."


# ---------------------------------------------------------------- tokens


def _token_rows(record: RunRecord) -> list[dict[str, Any]]:
    rows = []
    found = record.summary.get("tokens")
    for token in found if isinstance(found, list) else []:
        if not isinstance(token, dict):
            continue
        nearest = []
        for pair in token.get("nearest") or []:
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int | float):
                word = str(pair[0]).removesuffix("</w>")
                nearest.append((word, f"{pair[1]:.2f}"))
        row = {"name": str(token.get("name")), "encoder": str(token.get("encoder"))}
        for key in ("norm", "drift"):
            value = _number(token.get(key))
            row[key] = "" if value is None else format_number(value)
        rows.append({**row, "nearest": nearest})
    return rows


def _missing_tokens(record: RunRecord) -> str:
    trains = any("tokens" in stage.groups for stage in record.stages)
    if not trains:
        return "No stage trains tokens."
    if record.is_finished:
        return "Its summary.json says nothing about its tokens."
    return "The tokens are described at the end of a run."


# ---------------------------------------------------------------- files


def list_files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the files and folders of a run, weights first."""
    found = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            inside = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
            found.append((f"{path.name}/", sum(inside)))
        elif path.name != PAGE:
            found.append((path.name, path.stat().st_size))
    return sorted(found, key=lambda file: (not file[0].endswith(".safetensors"), file[0]))


def _file_rows(files: Sequence[tuple[str, int]], card: str) -> list[FileRow]:
    known = describe_files(card)
    rows = []
    for name, size in files:
        words = known.get(name.rstrip("/"), ())
        rows.append(FileRow(name, format_bytes(size), words))
    return rows


def _card_parts(card: str) -> list[CardPart]:
    parts = []
    for section in card_sections(card):
        if section.title == FILES:  # their descriptions are in the table of files
            continue
        grouped = []
        for kind, blocks in groupby(section.blocks, key=lambda block: block.kind):
            grouped.append((kind, list(blocks)))
        parts.append(CardPart(section.title, grouped))
    return parts
