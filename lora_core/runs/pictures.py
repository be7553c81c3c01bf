"""Images and plots as PNG files: labeled grids of images, line plots, histograms."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError
from lora_core.runs.sheet_layout import cell_width, fill_lines
from lora_core.runs.sheet_text import draw_text, text_height, text_width

INK, FAINT, PAPER = "#1b1f24", "#59636e", "#ffffff"
BORDER = "#d8dee4"  # around an image, so that a white one has an edge
MARGIN, GAP = 20, 12  # pixels around a grid, and between its images
LINE_GAP = 10  # more pixels between lines, where labels stand above
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 21, 15, 13  # of fonts, in pixels
LABEL_GAP = 16  # pixels between labels on the left and the images
WIDEST_LABEL = 130  # pixels of a label that stands on the left, and not above
COLORS = ("#bcd5ea", "#1b4f8a", "#d95f0e")  # of `plot_steps_and_lines`
MOST_NAMES = 12  # timesteps that `plot_validation` names
LINE_STYLES = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))  # of `plot_training`
NAME_INCHES = 0.078  # of a character of a legend, in a font of 9 points
FEW_VALUES = 16  # of a spectrum that is drawn with a marker at each
SPECTRUM_MARKERS = "osD^v"
OVER_STEPS = "over_steps.png"  # the sheet in a run's samples/ that `over_steps` writes
CELLS = "lora_core_cells"  # the PNG text chunk that says which image is where on a sheet


@dataclass(frozen=True)
class ImageRow:
    """One row of a grid: a label, images, and a caption under each."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()
    # What the images are, for programs: sample, base, tokens, after, new, training
    role: str = ""
    strength: float | None = None  # of the adapters
    notes: Sequence[str] | None = None  # drawn in the place of the captions, as they are shorter

    def image_height(self, cell: int) -> int:
        """Height of the tallest image when all are `cell` pixels wide."""
        return max(round(image.height * cell / image.width) for image in self.images)

    @property
    def texts(self) -> Sequence[str]:
        """What is drawn under the images."""
        return self.captions if self.notes is None else self.notes

    def width(self, cell: int) -> int:
        """Pixels from the first image to the end of the last."""
        return len(self.images) * (cell + GAP) - GAP

    def label_height(self, cell: int) -> int:
        """Pixels of the label above the images."""
        height = text_height(self.label, self.width(cell), LABEL_SIZE)
        return height + 4 if height else 0

    def caption_height(self, cell: int) -> int:
        """Pixels under the images."""
        height = max((text_height(text, cell, CAPTION_SIZE) for text in self.texts), default=0)
        return height + 4 if height else 0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """PIL images of pixels [b, 3, h, w] in [-1, 1].

    Raises UserError for NaN, which would come out black.
    """
    if bool(pixels.isnan().any()):
        raise UserError(
            "the pixels of an image are NaN; look at the network that drew it, "
            "or draw with --precision bf16 or fp32"
        )
    bytes_ = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = bytes_.permute(0, 2, 3, 1).cpu().contiguous()
    return [Image.frombytes("RGB", (a.shape[1], a.shape[0]), a.numpy().tobytes()) for a in array]


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with its text chunks, whole or not at all."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


# ---------------------------------------------------------------- grids


def in_quotes(prompt: str) -> str:
    """A prompt as it stands in a title."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{prompt}\N{RIGHT DOUBLE QUOTATION MARK}"


def draw_grid(
    rows: Sequence[ImageRow],
    *,
    title: str = "",
    columns: int = 0,
    headings: Sequence[str] = (),
    cell: int = 0,
) -> Image.Image:
    """All rows in one image: a title, labels on the left where they are short, else above their
    rows, and captions underneath. No text is cut.

    Rows go side by side where they fit in `columns` (0: those of the longest row). `headings` are
    words above each column. Each image is scaled to `cell` pixels wide (0: by `cell_width`) with
    Lanczos. The places of the images are in the sheet's `info`, from which `save_sheet` writes
    them.
    """
    columns = columns or max(len(row.images) for row in rows)
    cell = cell or cell_width(columns)
    lines = fill_lines([len(row.images) for row in rows], columns)
    left = MARGIN + _labels_width(rows, lines)
    is_above = left == MARGIN
    width = left + columns * (cell + GAP) - GAP + MARGIN
    top = MARGIN
    if title:
        top += text_height(title, width - 2 * MARGIN, TITLE_SIZE) + 10
    if headings:
        top += max(text_height(text, cell, LABEL_SIZE) for text in headings) + 4
    tops = []
    for line in lines:
        tops.append(top + (max(rows[i].label_height(cell) for i in line) if is_above else 0))
        top = tops[-1] + max(rows[i].image_height(cell) for i in line)
        top += max(rows[i].caption_height(cell) for i in line) + GAP + LINE_GAP * is_above
    height = top - GAP - LINE_GAP * is_above + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw_text(sheet, (MARGIN, MARGIN), title, width - 2 * MARGIN, size=TITLE_SIZE, color=INK)
    labels_top = tops[0] - (max(rows[i].label_height(cell) for i in lines[0]) if is_above else 0)
    for i, text in enumerate(headings):
        x = left + i * (cell + GAP)
        _draw_bottom(sheet, (x, labels_top - 4), text, cell, FAINT)
    cells: list[dict[str, Any]] = []
    for line, top in zip(lines, tops):
        x = left
        for row in (rows[i] for i in line):
            if is_above:
                _draw_bottom(sheet, (x, top - 4), row.label, row.width(cell), INK)
            else:
                middle = (
                    top + (row.image_height(cell) - text_height(row.label, left, LABEL_SIZE)) // 2
                )
                draw_text(sheet, (MARGIN, middle), row.label, left, size=LABEL_SIZE, color=INK)
            cells += _paste_row(sheet, row, (x, top), cell)
            x += row.width(cell) + GAP
    sheet.info[CELLS] = cells
    return sheet


def _labels_width(rows: Sequence[ImageRow], lines: Sequence[Sequence[int]]) -> int:
    """Pixels of labels on the left; 0 where there are none, or they stand above their rows."""
    widest = max(text_width(row.label, LABEL_SIZE) for row in rows)
    has_room = widest <= WIDEST_LABEL and len(lines) == len(rows)
    return widest + LABEL_GAP if has_room and any(row.label for row in rows) else 0


def _draw_bottom(
    sheet: Image.Image, corner: tuple[int, int], text: str, width: int, color: str
) -> None:
    """Draw a text whose last line ends at the corner (left, bottom)."""
    top = corner[1] - text_height(text, width, LABEL_SIZE)
    draw_text(sheet, (corner[0], top), text, width, size=LABEL_SIZE, color=color)


def save_sheet(sheet: Image.Image, path: Path, *, step: int, is_private: bool) -> None:
    """Write a grid as PNG, with a text chunk (CELLS) in which `report_images` finds its images.

    `is_private`: whether they show images that only the owner of the run has.
    """
    facts = {"step": step, "private": is_private, "cells": sheet.info.get(CELLS, [])}
    save_png(sheet, path, {CELLS: json.dumps(facts)})


def _paste_row(
    sheet: Image.Image, row: ImageRow, corner: tuple[int, int], cell: int
) -> list[dict[str, Any]]:
    """Put the images and captions of a row on the sheet, the first image at `corner` (left, top);
    returns what the sheet says of each: its place, caption ...
    """
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    under = top + row.image_height(cell) + 5
    cells = []
    for i, image in enumerate(row.images):
        x = left + i * (cell + GAP)
        size = cell, round(image.height * cell / image.width)
        box = (x, top, x + size[0], top + size[1])
        draw.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), outline=BORDER)
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (x, top))
        text = row.texts[i] if i < len(row.texts) else ""
        draw_text(sheet, (x, under), text, cell, size=CAPTION_SIZE, color=FAINT)
        caption = row.captions[i] if i < len(row.captions) else ""
        own = {"role": row.role, "label": row.label, "strength": row.strength}
        cells.append({"box": box, "caption": caption, **own})
    return cells


# ---------------------------------------------------------------- plots

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> x, y


def plot_lines(
    series: Series,
    path: Path,
    *,
    axes: tuple[str, str],
    title: str = "",
    log: bool = False,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """A line plot of named (x, y) series as PNG; with `errors` (one per point), which differences
    have, error bars and a line at 0.
    """
    with _figure(path) as axis:
        if errors:
            axis.axhline(0, color=INK, linewidth=0.8)
        for name, (x, y) in series.items():
            yerr = (errors or {}).get(name)
            marker = "o" if errors else ""
            axis.errorbar(
                x, y, yerr=yerr, label=name, linewidth=1.4, capsize=3, marker=marker, markersize=4
            )
        scale = "log" if log else "linear"
        axis.set(xlabel=axes[0], ylabel=axes[1], title=title, yscale=scale)
        axis.grid(alpha=0.3)
        places = list(chain.from_iterable(x for x, _ in series.values()))
        if len(set(places)) == 1:
            axis.set_xlim(places[0] - 1, places[0] + 1)
        if all(float(place).is_integer() for place in places):
            axis.locator_params(axis="x", integer=True)
        if len(series) > 1:
            axis.legend(edgecolor="white")


def plot_spectra(series: Series, path: Path, *, title: str) -> None:
    """A plot of named singular values by their index as PNG, on a logarithmic axis. Single values
    are points, side by side where none has more. The names stand beside the axes, whole.
    """
    longest = max(len(x) for x, _ in series.values())
    name_width = max(map(len, series)) * NAME_INCHES
    with _figure(path, width=7.5 + name_width) as axis:
        for i, (name, (x, y)) in enumerate(series.items()):
            has_marker = longest <= FEW_VALUES or len(x) == 1
            look = {
                "marker": SPECTRUM_MARKERS[i % len(SPECTRUM_MARKERS)] if has_marker else "",
                "linestyle": "none" if len(x) == 1 else LINE_STYLES[i // 10 % len(LINE_STYLES)],
                "color": f"C{i % 10}",
            }
            places = [i + 1] if longest == 1 else x
            axis.plot(places, y, label=name, linewidth=1.6, markersize=7, **look)
        axis.set(xlabel="index", ylabel="singular value of delta W", yscale="log")
        axis.set_title("\n".join(textwrap.wrap(title, 70)), fontsize=11)
        axis.set_xlim(0.5, (len(series) if longest == 1 else longest) + 0.5)
        axis.locator_params(axis="x", integer=True)
        if longest == 1:
            axis.set_xticks([])
            axis.set(xlabel="every layer has one singular value: the file has rank 1")
        axis.grid(alpha=0.3)
        axis.figure.legend(loc="outside right upper", frameon=False, fontsize=9)


def plot_seed_differences(
    by_seed: Mapping[int, float], whole: tuple[float, float], path: Path, *, label: str, title: str
) -> None:
    """A PNG plot of a difference: a point for each seed, and `whole`, the mean and its standard
    error (or nan), as a line with a band.
    """
    mean, error = whole
    with _figure(path) as axis:
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.axhline(mean, color=COLORS[1], linewidth=1.6, label="mean")
        if math.isfinite(error):
            axis.axhspan(mean - error, mean + error, color=COLORS[0], alpha=0.6, label="std. error")
        if by_seed:
            axis.plot(
                range(len(by_seed)), list(by_seed.values()), "o", color=COLORS[2], label="each seed"
            )
            axis.set_xticks(range(len(by_seed)), list(map(str, by_seed)))
            axis.set_xlim(-0.5, len(by_seed) - 0.5)
        else:
            axis.set_xticks([])
        axis.set(xlabel="seed", ylabel=label, title=title)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(edgecolor="white")


class TrainingLook(NamedTuple):
    """How `plot_training` draws its lines."""

    log: bool = False
    marks: Sequence[tuple[float, str]] = ()  # (step, text) of vertical lines, such as stages
    faint: str = ""  # the name of a line that is only a background, such as the single steps


def plot_training(
    series: Series, path: Path, *, axes: tuple[str, str], title: str, look: TrainingLook
) -> None:
    """A line plot of metrics over steps as PNG. Later lines are thinner and dashed, so that an
    earlier one below them is seen.
    """
    with _figure(path) as axis:
        solid = 0
        for name, (x, y) in series.items():
            if name == look.faint:
                axis.plot(x, y, label=name, linewidth=1, color=COLORS[0])
                continue
            style = LINE_STYLES[solid % len(LINE_STYLES)]
            width = max(2.6 - 0.6 * solid, 1.2)
            axis.plot(x, y, label=name, linewidth=width, linestyle=style, color=f"C{solid}")
            solid += 1
        _draw_marks(axis, look.marks)
        axis.set(xlabel=axes[0], ylabel=axes[1], yscale="log" if look.log else "linear")
        axis.set_title(title, fontsize=11, pad=18 if look.marks else 6)
        axis.grid(alpha=0.3)
        axis.locator_params(axis="x", integer=True)
        if len(series) > 1:
            axis.legend(edgecolor="white")


def plot_logged_values(
    series: Series, path: Path, *, marks: Sequence[tuple[float, str]], window: int
) -> None:
    """A PNG with a panel below another for each value that a loss logs over steps, and its running
    mean.
    """
    with _figure(path, rows=len(series)) as axes:
        for axis, (name, (x, y)) in zip([axes] if len(series) == 1 else axes, series.items()):
            axis.plot(x, y, linewidth=1, color=COLORS[0])
            axis.plot(x, running_mean(y, window), linewidth=2, color=COLORS[1])
            axis.set(ylabel=name)
            axis.grid(alpha=0.3)
            axis.locator_params(axis="x", integer=True)
            _draw_marks(axis, marks)
        axis.set(xlabel="step")


def plot_validation(
    over_steps: Series,
    before_after: Mapping[str, tuple[float, float]],
    path: Path,
    *,
    title: str,
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """A PNG of the validation loss: left the change in percent of each timestep over steps, and of
    all of them, thick, or bars of two validations; right the loss before and after.
    """
    import matplotlib.pyplot as plt

    with _figure(path, panels=2) as (left, right):
        names = list(over_steps)
        every = -(-len(names) // MOST_NAMES)
        has_course = any(len(x) > 2 for x, _ in over_steps.values())
        for i, (name, (x, y)) in enumerate(over_steps.items()):
            if not has_course:  # a line between two points shows no course
                left.bar(i, y[-1], 0.6, color=INK if i == len(names) - 1 else COLORS[1])
                continue
            is_last = i == len(names) - 1  # of all timesteps
            color = INK if is_last else plt.get_cmap("viridis")(0.9 * i / max(len(names) - 2, 1))
            is_named = is_last or i % every == 0
            width = 3 if is_last else 1.4
            label = name if is_named else None
            left.plot(x, y, ".-", label=label, color=color, linewidth=width)
        left.axhline(0, color=INK, linewidth=0.8)
        left.set(xlabel="step" if has_course else "timestep", ylabel="change in %")
        left.set_title(f"{title}, change", fontsize=10, pad=18 if marks else 6)
        if has_course:
            left.locator_params(axis="x", integer=True)
            left.legend(fontsize=8, frameon=False)
            _draw_marks(left, marks)
        else:
            left.set_xticks(list(range(len(names)))[::every], names[::every])
        places = range(len(before_after))
        for k, (words, color) in enumerate((("before", COLORS[0]), ("after", COLORS[1]))):
            heights = [pair[k] for pair in before_after.values()]
            offsets = [place + 0.4 * k - 0.2 for place in places]
            right.bar(offsets, heights, 0.4, label=words, color=color)
        right.set_xticks(list(places)[::every], list(before_after)[::every])
        right.set(xlabel="timestep", ylabel="loss")
        right.set_title(f"{title}, before and after", fontsize=10, pad=18 if marks else 6)
        right.legend(frameon=False)
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)


def _draw_marks(axis: Any, marks: Sequence[tuple[float, str]]) -> None:
    for x, text in marks:
        axis.axvline(x, color="gray", linestyle="--", linewidth=0.9)
        place = {"xy": (x, 1.0), "xycoords": ("data", "axes fraction")}
        axis.annotate(text, **place, xytext=(2, 4), textcoords="offset points", fontsize=8)


def plot_steps_and_lines(
    filled: Series,
    series: Series,
    path: Path,
    *,
    axes: tuple[str, str, str],
    title: str = "",
    log: bool = False,
) -> None:
    """A PNG plot: histograms `filled` on the left axis, lines of `series` on the right axis.

    The left axis begins at 0, the right one is logarithmic with `log`. `axes` names x, left and
    right. x are the middles of equal bins.
    """
    with _figure(path) as axis:
        right, colors = axis.twinx(), iter(COLORS)
        for i, (name, (x, y)) in enumerate(filled.items()):
            half = (x[1] - x[0]) / 2
            edges = [x[0] - half, *(middle + half for middle in x)]
            color = next(colors)
            axis.stairs(y, edges, label=name, fill=i == 0, color=color, linewidth=1.6)
            axis.set_xlim(edges[0], edges[-1])
        for name, (x, y) in series.items():
            right.plot(x, y, label=name, linewidth=1.6, color=next(colors))
        axis.set(xlabel=axes[0], ylabel=axes[1])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.25 * max(_all_values(filled)))  # room for the legend
        right.set(ylabel=axes[2], yscale="log" if log else "linear")
        low, high = min(_all_values(series)), max(_all_values(series))
        right.set_ylim(low if log else 0, high * (high / low) ** 0.25 if log else 1.25 * high)
        handles = axis.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0]
        columns = len(handles)
        axis.legend(handles=handles, frameon=False, ncols=columns, loc="upper center", fontsize=9)
        axis.grid(alpha=0.3)


def _all_values(series: Series) -> list[float]:
    return list(chain.from_iterable(y for _, y in series.values()))


@contextmanager
def _figure(path: Path, panels: int = 1, rows: int = 1, width: float = 8) -> Iterator[Any]:
    """Axes of a new figure, or of several side by side or in rows, which is written to `path` as
    PNG when the block ends without error.
    """
    import matplotlib.pyplot as plt  # one second of import that only a plot needs

    plt.switch_backend("Agg")
    size = (width if panels == 1 else 5.5 * panels, 4.5 if rows == 1 else 2.6 * rows)
    figure, axis = plt.subplots(rows, panels, figsize=size, layout="constrained")
    try:
        yield axis
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        plt.close(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, at each value."""
    total = 0.0
    means = []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
