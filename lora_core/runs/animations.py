"""Animations: images one after another, each with a line below it, as GIF or WebP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lora_core.atomic_files import atomic_write
from lora_core.runs.pictures import FAINT, INK, PAPER
from lora_core.runs.sheet_text import draw_text, text_height, text_width

ENDINGS = {".gif": "GIF", ".webp": "WEBP"}
FRAME, HELD = 200, 1000  # milliseconds of a frame, and of the first and the last
SMALLEST_WIDTH = 256  # pixels of a frame
CAPTION_SIZE = 16  # of the font, in pixels
BAR = 4  # pixels of the line that shows how far the animation is


def save_animation(images: Sequence[Image.Image], captions: Sequence[str], path: Path) -> str:
    """Write the images as frames, each with its caption, over and over; returns what was written:
    the frames and their duration, in words.

    The format follows from the ending, .gif or .webp. The first and the last frame stay longer. A
    frame of a GIF has 256 colors of its own, dithered.
    """
    frames = draw_frames(images, captions)
    durations = [FRAME] * len(frames)
    durations[0] = durations[-1] = HELD
    settings: dict[str, Any] = {"save_all": True, "loop": 0, "duration": durations}
    kind = ENDINGS[path.suffix.lower()]
    if kind == "GIF":
        frames = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
        settings |= {"optimize": False, "disposal": 1}
    else:
        settings |= {"quality": 90, "method": 4}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        first, *others = frames
        first.save(temporary, format=kind, append_images=others, **settings)
    return (
        f"{path.name}: {len(frames)} frames of {FRAME / 1000:g} s, the first and the last "
        f"{HELD / 1000:g} s, {sum(durations) / 1000:g} s in all, over and over"
    )


def draw_frames(images: Sequence[Image.Image], captions: Sequence[str]) -> list[Image.Image]:
    """Each image with its caption and a bar of its place below it, all of one size, no text cut.
    Small images are enlarged to SMALLEST_WIDTH.
    """
    width = max(SMALLEST_WIDTH, images[0].width)
    height = round(images[0].height * width / images[0].width)
    text = max(text_height(caption, width - 16, CAPTION_SIZE) for caption in captions)
    frames = []
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        frame = Image.new("RGB", (width, height + BAR + text + 16), PAPER)
        scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        frame.paste(scaled, (0, 0))
        done = round(width * (place + 1) / len(images))
        ImageDraw.Draw(frame).rectangle((0, height, done - 1, height + BAR - 1), fill=FAINT)
        left = max(8, (width - text_width(caption, CAPTION_SIZE)) // 2)
        corner = (left, height + BAR + 8)
        draw_text(frame, corner, caption, width - 16, size=CAPTION_SIZE, color=INK)
        frames.append(frame)
    return frames
