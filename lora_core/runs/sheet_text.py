"""Text on images: fonts, and lines that fit a width in pixels."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LEADING = 1.3  # height of a line, in sizes of its font
MISSING = "\uffff"  # a character that no font has


def text_lines(text: str, width: float, size: int) -> list[str]:
    """The lines of a text, none wider than `width` pixels at a font size; a word that is wider is
    broken. No character but spaces at the breaks is left out.
    """
    font = find_font(size, text)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            *full, line = _break_word(word, width, font)
            lines += full
        if line:
            lines.append(line)
    return lines


def _break_word(word: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """The parts of a word that are as long as `width` pixels allow, at least a character each."""
    parts, part = [], ""
    for character in word:
        if part and font.getlength(part + character) > width:
            parts.append(part)
            part = ""
        part += character
    return [*parts, part]


def line_height(size: int) -> int:
    """Pixels from line to line at a font size."""
    return round(LEADING * size)


def text_height(text: str, width: float, size: int) -> int:
    """Pixels of height that `draw_text` takes."""
    return line_height(size) * len(text_lines(text, width, size))


def text_width(text: str, size: int) -> int:
    """Pixels of the widest line of a text without breaks of its own."""
    font = find_font(size, text)
    return round(max(map(font.getlength, text.split("\n"))) + 0.5)


def draw_text(
    image: Image.Image, corner: tuple[int, int], text: str, width: float, *, size: int, color: str
) -> int:
    """Draw the lines of a text from the corner (left, top) down; returns their height in pixels."""
    draw, font = ImageDraw.Draw(image), find_font(size, text)
    lines = text_lines(text, width, size)
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height(size)), line, color, font)
    return line_height(size) * len(lines)


def find_font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """The font that Pillow brings, or for letters that it lacks, matplotlib's DejaVu Sans (Greek,
    Cyrillic, Arabic ...; it has no Chinese, Japanese or Korean).
    """
    is_known = all(_has_glyph(character) for character in set(text) if not character.isspace())
    return _usual_font(size) if is_known else _wide_font(size)


@cache
def _has_glyph(character: str) -> bool:
    """Whether the font that Pillow brings draws it, and no box for a missing one."""
    masks = [_usual_font(20).getmask(each) for each in (character, MISSING)]
    return masks[0].size != masks[1].size or bytes(masks[0]) != bytes(masks[1])


@cache
def _usual_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has FreeType in all its wheels
    return font


@cache
def _wide_font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # half a second of import that only such a text needs

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / "DejaVuSans.ttf", round(0.92 * size))
