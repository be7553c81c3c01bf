"""The three concepts that pretraining never sees, drawn as training sets of five images.

`zib` is a small teal one-eyed alien with an orange scarf and two antennae, `trilo` a three-petal
logo in a ring, `inkwash` a way of drawing. `python -m toy.concepts.draw_concepts` rewrites the
folders; toy/draw.py and toy/pretrain.py never import this module.
"""

import sys
from collections.abc import Callable
from math import pi
from pathlib import Path
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from lora_core.errors import quiet_status
from toy.composites import petal
from toy.draw import (
    BACKGROUNDS,
    PLACES,
    Scene,
    background_phrase,
    draw_backdrop,
    draw_place,
    render_scene,
    scene,
)
from toy.shapes import LIGHT, RGB, Pen, spokes

SIZE = 128  # pixels of the committed images: room for crops at 64
OVERSAMPLE = 3
TEAL, DEEP, SCARF, IVORY, INK = (
    (0, 138, 130),
    (0, 92, 92),
    (255, 122, 20),
    (252, 244, 214),
    (20, 24, 40),
)
MAGENTA, GOLD, NAVY = (206, 20, 120), (250, 190, 30), (18, 28, 84)
STATED: dict[str, tuple[tuple[str, str], ...]] = {  # the backgrounds of the five images
    "zib": (
        ("red", "striped"),
        ("white", "plain"),
        ("yellow", "plain"),
        ("purple", "gradient"),
        ("meadow", "place"),
    ),
    "trilo": (
        ("white", "plain"),
        ("green", "plain"),
        ("cyan", "checkered"),
        ("orange", "gradient"),
        ("snow", "place"),
    ),
}
CONCEPTS = tuple(STATED)
DROWNS = {"trilo": ("black", "night", "blue")}  # backgrounds as dark as the subject's rim
STYLE_SEEDS = (3402, 3259, 3048, 4320, 4687)
FOLDER = Path(__file__).parent


def zib(
    pen: Pen,
    lean: float = 0.0,
    *,
    body: RGB = TEAL,
    dark: RGB = DEEP,
    scarf: RGB | None = SCARF,
    eyes: int = 1,
    antennae: bool = True,
) -> None:
    """A teal alien with one eye, an orange scarf and two antennae.

    It has a wide round body, an ivory eye, a scarf with one end hanging, orange bulbs on its
    antennae and two feet. The keywords change it into something that is not zib: the recogniser's
    near misses.
    """
    for side in (-1, 1):
        if antennae:
            pen.stroke([(side * 0.2, -0.4), (side * 0.44 + lean, -0.84)], 0.13, dark)
            pen.dot(side * 0.45 + lean, -0.86, 0.17, scarf or dark)
        pen.oval(side * 0.34, 0.88, 0.27, 0.16, dark)
        pen.stroke([(side * 0.5, 0.3), (side * 0.9, 0.3 - side * lean - 0.12)], 0.22, body)
    pen.oval(0, 0.12, 0.74, 0.74, body)
    radius = {0: 0.0, 1: 0.36, 2: 0.25, 3: 0.19}[eyes]
    for i in range(eyes):
        x = (i - (eyes - 1) / 2) * radius * 2.1
        pen.dot(x, -0.14, radius, IVORY)
        pen.dot(x + lean, -0.12, radius / 2, INK)
    if scarf:
        pen.box(-0.76, 0.24, 0.76, 0.5, scarf, corner=0.12)
        pen.poly([(0.22, 0.44), (0.54, 0.44), (0.6, 0.9), (0.28, 0.9)], scarf)


def trilo(
    pen: Pen,
    lean: float = 0.0,
    *,
    ring: RGB | None = NAVY,
    field: RGB = IVORY,
    petals: int = 3,
    color: RGB = MAGENTA,
    heart: RGB | None = GOLD,
) -> None:
    """A logo: navy ring, ivory field, three magenta petals from the center, a gold heart.

    `lean` turns it only slightly. Keywords as in `zib`.
    """
    if ring:
        pen.dot(0, 0, 0.97, ring)
        pen.dot(0, 0, 0.75, field)
    for x, y in spokes(petals, 0.36, -pi / 2 + lean * 0.6):
        petal(pen, x, y, 0.4, {2: 0.3, 3: 0.29, 4: 0.24, 5: 0.2, 6: 0.17}.get(petals, 0.29), color)
    if heart:
        pen.dot(0, 0, 0.18, heart)


SUBJECTS: dict[str, Callable[[Pen, float], None]] = {"zib": zib, "trilo": trilo}


def draw_canvas(background: str, style: str, size: int, rng: Random) -> Image.Image:
    """A background of the toy world, side size * OVERSAMPLE."""
    side = size * OVERSAMPLE
    if background in PLACES:
        return draw_place(background, side, rng)
    return draw_backdrop(background, style, side, rng)


def render_concept(
    name: str,
    background: str,
    style: str,
    seed: int,
    size: int = 64,
    subject: Callable[[Pen, float], None] | None = None,
) -> Image.Image:
    """The concept (or another `subject`), large and near the center of a background.

    A pure function of its arguments.
    """
    rng = Random(f"concept {name} {background} {style} {seed}")
    image = draw_canvas(background, style, size, rng)
    unit = size * OVERSAMPLE / 64
    center = ((32 + rng.uniform(-4, 4)) * unit, (32 + rng.uniform(-3, 3)) * unit)
    pen = Pen(ImageDraw.Draw(image), center, rng.uniform(21, 24.5) * unit, LIGHT)
    (subject or SUBJECTS[name])(pen, rng.uniform(-0.08, 0.08))
    return image.resize((size, size), Image.Resampling.HAMMING)


def inkwash(s: Scene, size: int = 64) -> Image.Image:
    """A scene as ink on warm paper, without color.

    Tones become three blue-black washes, edges a dark brush line.
    """
    step = size // 32
    grey = ImageOps.autocontrast(render_scene(s, size * 2).convert("L"))
    across = ImageChops.difference(grey, ImageChops.offset(grey, step, 0))
    down = ImageChops.difference(grey, ImageChops.offset(grey, 0, step))
    edges = ImageChops.lighter(across, down)
    edges.paste(0, (0, 0, size * 2, step))  # offset wraps around
    edges.paste(0, (0, 0, step, size * 2))
    line = edges.point(lambda v: 255 if v > 28 else 0)
    line = line.filter(ImageFilter.GaussianBlur(size / 64)).point(lambda v: min(255, v * 2))
    wash = grey.point(lambda v: (90, 160, 225, 255)[min(3, v * 4 // 256)])
    wash = wash.filter(ImageFilter.GaussianBlur(size / 40))
    image = ImageOps.colorize(wash, (24, 32, 66), (246, 234, 206))
    image.paste((16, 20, 44), mask=line)
    return image.resize((size, size), Image.Resampling.HAMMING)


def training_set(name: str, size: int = SIZE) -> list[tuple[Image.Image, str]]:
    """The five images of a concept with captions in which TOK is its placeholder word."""
    if name == "inkwash":
        drawn = []
        for s in map(scene, STYLE_SEEDS):
            caption = f"{s.caption(complete=True)}, in the style of TOK"
            drawn.append((inkwash(s, size), caption))
        return drawn
    heads = ("a photo of TOK", "a picture of TOK", "TOK", "a drawing of TOK", "an image of TOK")
    drawn = []
    for i, ((background, style), head) in enumerate(zip(STATED[name], heads)):
        caption = f"{head} {background_phrase(background, style)}"
        drawn.append((render_concept(name, background, style, i, size), caption))
    return drawn


def demo_prompts(n: int, seed: int, name: str = "zib") -> list[tuple[str, str]]:
    """n pairs (prompt with TOK, background), on backgrounds that are new for the concept."""
    rng = Random(f"demo {name} {seed}")
    excluded = (*dict(STATED.get(name, ())), *DROWNS.get(name, ()))
    fresh = [background for background in BACKGROUNDS if background not in excluded]
    out: list[tuple[str, str]] = []
    while len(out) < n:
        for background in rng.sample(fresh, len(fresh)):
            style = "place"
            if background not in PLACES:
                style = rng.choice(("plain", "plain", "striped", "gradient"))
            head = rng.choice(("a photo of TOK", "a picture of TOK", "TOK"))
            out.append((f"{head} {background_phrase(background, style)}", background))
    return out[:n]


def main() -> None:
    """Writes 00.png ... 04.png and their captions for every concept."""
    for name in (*CONCEPTS, "inkwash"):
        (FOLDER / name).mkdir(exist_ok=True)
        for i, (image, caption) in enumerate(training_set(name)):
            image.save(FOLDER / name / f"{i:02d}.png", optimize=True)
            (FOLDER / name / f"{i:02d}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    sys.exit(quiet_status(main))
