"""Text on sheets: nothing is cut, whatever its length and script."""

import random

import pytest
from PIL import Image, ImageChops

from lora_core.runs.sheet_text import (
    draw_text,
    find_font,
    line_height,
    text_height,
    text_lines,
    text_width,
)

LONG = "a portrait of TOK as a sailor, " * 20 + "Donaudampfschifffahrtsgesellschaft" * 4


@pytest.mark.parametrize("width", [40, 111, 250, 1000])
@pytest.mark.parametrize("text", [LONG, "", "one", "a\nb c", "фото кота на снегу " * 9, "é ü ß €"])
def test_lines_fit_and_keep_every_character(text: str, width: int) -> None:
    lines = text_lines(text, width, 15)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    font = find_font(15, text)
    assert all(font.getlength(line) <= width for line in lines)
    assert text_height(text, width, 15) == len(lines) * line_height(15)


def test_random_texts_fit() -> None:
    dice = random.Random(3)
    for _ in range(40):
        words = ["".join(dice.choices("iWm.éя", k=dice.randint(1, 30))) for _ in range(12)]
        width = dice.randint(30, 300)
        lines = text_lines(" ".join(words), width, 13)
        font = find_font(13, " ".join(words))
        assert "".join(lines).replace(" ", "") == "".join(words)
        assert all(font.getlength(line) <= width for line in lines)


def test_ink_stays_in_the_box() -> None:
    image = Image.new("RGB", (300, 400), "white")
    height = draw_text(image, (20, 30), LONG[:300], 200, size=15, color="black")
    left, top, right, bottom = ImageChops.invert(image).getbbox() or (0, 0, 0, 0)
    assert left >= 19 and right <= 221
    assert top >= 30 and bottom <= 30 + height
    assert text_width("a long line", 15) > text_width("a", 15)


def test_other_scripts_have_letters_and_no_boxes() -> None:
    """Pillow's font draws every letter that it lacks as the same box."""
    for text in ("é", "ж", "λ"):
        font = find_font(20, text)
        assert bytes(font.getmask(text)) != bytes(font.getmask("\uffff"))
    assert find_font(20, "plain").getname() != find_font(20, "жук").getname()
