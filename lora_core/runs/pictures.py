"""Tensors to PNG files: labelled grids of images and plots of metrics."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lora_core.errors import UserError
from lora_core.runs.run_folder import atomic_write

INK, PAPER = "#1b1f24", "#ffffff"


@dataclass(frozen=True)
class ImageRow:
    """One row of a grid: a label on the left, images, and a caption under each."""

    label: str
    images: Sequence[Image.Image]
    captions: Sequence[str] = ()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """PIL images of pixels [b, 3, h, w] in [-1, 1]. Raises UserError for NaN, which would come out black."""
    if bool(pixels.isnan().any()):
        raise UserError("the pixels of a picture are NaN; look at the network that drew it, or draw with --precision bf16 or fp32")
    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()
    return [Image.frombytes("RGB", (a.shape[1], a.shape[0]), a.numpy().tobytes()) for a in array]


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with its text chunks, whole or not at all."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def draw_grid(rows: Sequence[ImageRow], *, title: str = "", cell: int = 192) -> Image.Image:
    """All rows in one picture, each image scaled to `cell` pixels wide with Lanczos, labels on the left, captions underneath."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(17)
    gap, margin, line = 10, 14, 16
    label_width = 170 if any(row.label for row in rows) else 0
    columns = max(len(row.images) for row in rows)
    under = [max((len(_wrap(c, cell, 6.4)) for c in row.captions), default=0) * line + (6 if row.captions else 0) for row in rows]
    heights = [max(round(im.height * cell / im.width) for im in row.images) for row in rows]
    top = margin + (34 if title else 0)
    size = (2 * margin + label_width + columns * (cell + gap) - gap, top + sum(heights) + sum(under) + gap * (len(rows) - 1) + margin)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, INK, bold)
    y = top
    for row, height, below in zip(rows, heights, under):
        for i, text in enumerate(_wrap(row.label, label_width - 12, 7.6)):
            draw.text((margin, y + 4 + 20 * i), text, INK, ImageFont.load_default(15))
        for i, image in enumerate(row.images):
            x = margin + label_width + i * (cell + gap)
            sheet.paste(image.convert("RGB").resize((cell, round(image.height * cell / image.width)), Image.Resampling.LANCZOS), (x, y))
            for j, text in enumerate(_wrap(row.captions[i], cell, 6.4) if i < len(row.captions) else []):
                draw.text((x, y + height + 4 + line * j), text, INK, font)
        y += height + below + gap
    return sheet


def _wrap(text: str, width: float, advance: float) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, max(1, int(width / advance)))]


Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plot_lines(
    series: Series, path: Path, *, axes: tuple[str, str], title: str = "", log: bool = False, errors: Mapping[str, Sequence[float]] | None = None
) -> None:
    """A line plot of named (x, y) series as PNG; with `errors` (one per point), error bars."""
    with _figure(path) as axis:
        for name, (x, y) in series.items():
            axis.errorbar(x, y, yerr=(errors or {}).get(name), label=name, linewidth=1.4, capsize=3)
        axis.set(xlabel=axes[0], ylabel=axes[1], title=title, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
        if all(float(value).is_integer() for x, _ in series.values() for value in x):
            axis.locator_params(axis="x", integer=True)
        if len(series) > 1:
            axis.legend(edgecolor="white")


def plot_steps_and_lines(filled: Series, series: Series, path: Path, *, axes: tuple[str, str, str], title: str = "", log: bool = False) -> None:
    """As PNG: `filled` as steps on the left axis, from 0, and lines of `series` over it on the right axis, which `log` makes logarithmic.

    `axes` names x, left and right. x are the middles of equal bins.
    """
    with _figure(path) as axis:
        right, colours = axis.twinx(), iter(("#bcd5ea", "#1b4f8a", "#d95f0e"))
        for i, (name, (x, y)) in enumerate(filled.items()):
            half = (x[1] - x[0]) / 2
            edges = [x[0] - half, *(v + half for v in x)]
            axis.stairs(y, edges, label=name, fill=i == 0, color=next(colours), linewidth=1.6)
            axis.set_xlim(edges[0], edges[-1])
        for name, (x, y) in series.items():
            right.plot(x, y, label=name, linewidth=1.6, color=next(colours))
        axis.set(xlabel=axes[0], ylabel=axes[1])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.25 * max(v for _, y in filled.values() for v in y))  # room for the legend
        right.set(ylabel=axes[2], yscale="log" if log else "linear")
        values = [v for _, y in series.values() for v in y]
        right.set_ylim(min(values) if log else 0, 1.25 * max(values) if not log else max(values) * (max(values) / min(values)) ** 0.25)
        handles = [h for part in (axis, right) for h in part.get_legend_handles_labels()[0]]
        axis.legend(handles=handles, frameon=False, ncols=len(handles), loc="upper center", fontsize=9)
        axis.grid(alpha=0.3)


@contextmanager
def _figure(path: Path) -> Iterator[Any]:
    """Axes of a new figure that is written to `path` as PNG, whole or not at all, when what is drawn on them is complete."""
    import matplotlib.pyplot as plt  # one second of import that only a plot needs

    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    try:
        yield axis
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        plt.close(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last `window` values."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out
