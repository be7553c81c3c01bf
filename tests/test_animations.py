"""Animations: their frames and times, read by the rules of the formats and not by their writer."""

import struct
from pathlib import Path

import pytest
from PIL import Image

from lora_core.runs.animations import draw_frames, save_animation

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def gif_delays(data: bytes) -> list[int]:
    """The delay of each frame in hundredths of a second, by the blocks of GIF89a."""
    assert data[:6] == b"GIF89a"
    packed, place, delays = data[10], 13, []
    place += 3 * 2 ** ((packed & 7) + 1) if packed & 128 else 0
    while data[place] != 0x3B:
        if data[place] == 0x21:
            if data[place + 1] == 0xF9:
                delays.append(struct.unpack_from("<H", data, place + 4)[0])
            place += 2
        else:
            assert data[place] == 0x2C
            packed = data[place + 9]
            place += 10 + (3 * 2 ** ((packed & 7) + 1) if packed & 128 else 0) + 1
        while data[place]:
            place += data[place] + 1
        place += 1
    return delays


def webp_delays(data: bytes) -> list[int]:
    """The duration of each frame in milliseconds, by the ANMF chunks of the WebP container."""
    assert data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    place, delays = 12, []
    while place < len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        if name == b"ANMF":
            delays.append(int.from_bytes(data[place + 20 : place + 23], "little"))
        place += 8 + size + size % 2
    return delays


@pytest.mark.parametrize("ending", [".gif", ".webp", ".GIF"])
def test_files_have_the_frames_and_times_that_are_said(tmp_path: Path, ending: str) -> None:
    images = [Image.new("RGB", (64, 64), color) for color in COLORS]
    path = tmp_path / "new" / f"alpha{ending}"
    said = save_animation(images, ["strength 0", "strength 0.5", "strength 1"], path)
    assert said.startswith(f"{path.name}: 3 frames of 0.2 s") and "2.2 s in all" in said
    data = path.read_bytes()
    if ending == ".webp":
        assert webp_delays(data) == [1000, 200, 1000]
    else:
        assert gif_delays(data) == [100, 20, 100]
    opened = Image.open(path)
    for i, color in enumerate(COLORS):
        opened.seek(i)
        pixel = opened.convert("RGB").getpixel((30, 30))
        assert isinstance(pixel, tuple)
        assert max(abs(x - y) for x, y in zip(pixel, color)) <= 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_frames_are_of_one_size_and_hold_long_captions() -> None:
    images = [Image.new("RGB", (64, 32)), Image.new("RGB", (64, 32))]
    frames = draw_frames(images, ["short", "a very long caption " * 12])
    assert frames[0].size == frames[1].size and frames[0].width == 256
    assert frames[0].height > 128 + 5 * 20
    assert frames[1].crop((0, 140, 256, frames[1].height)).getcolors(10_000) != [(1, (0, 0, 0))]
