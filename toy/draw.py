"""Scenes of the toy world with their images and captions.

A scene is put together by a grammar of objects, colors, textures, sizes, positions and places. It
is a pure function of an integer seed, and so are its image and any caption drawn from it. The
concepts that a user teaches the model (toy/concepts) are drawn elsewhere and never imported here.
"""

from dataclasses import asdict, dataclass
from random import Random

from PIL import Image, ImageDraw

from toy.composites import COMPOSITES, second_color
from toy.shapes import COLORS, RGB, SIMPLE_SHAPES, Pen, blend, lighten

OBJECTS: tuple[str, ...] = (*SIMPLE_SHAPES, *COMPOSITES)
TEXTURES = ("plain", "striped", "dotted")
# Radius in pixels of a 64 x 64 image.
SIZES: dict[str, tuple[float, float]] = {"small": (15.0, 16.5), "large": (20.5, 22.5)}
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
REACH = {"small": 12.0, "large": 9.0}  # pixels from the center at a stated position
STYLES = ("plain", "striped", "checkered", "gradient")
# Phrase, and the object colors that would be hard to see in it.
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "meadow": ("in a meadow", ("green", "cyan")),
    "night": ("at night", ("black",)),
    "sea": ("in the sea", ("blue", "cyan")),
    "desert": ("in the desert", ("yellow", "orange")),
    "snow": ("in the snow", ("white",)),
}
BACKGROUNDS: tuple[str, ...] = (*COLORS, *PLACES)
CAPTION_TEMPLATES = (
    "a photo of {}",
    "a drawing of {}",
    "a picture of {}",
    "an image of {}",
    "an illustration of {}",
    "a rendering of {}",
    "a good photo of {}",
    "a close-up of {}",
    "a cartoon of {}",
    "a nice picture of {}",
    "the photo of {}",
    "a painting of {}",
)
OVERSAMPLE = 3
COMPOSITE_SHARE = {"creature": 0.22, "emblem": 0.13}


@dataclass(frozen=True)
class Scene:
    """One object on one background."""

    seed: int
    object: str
    color: str
    texture: str
    size: str
    position: str
    background: str
    style: str  # the background's pattern, or "place" where the background is a place

    def attributes(self) -> dict[str, str]:
        """The labels of the scene, without its seed."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}

    def caption(self, seed: int | None = None, complete: bool = False) -> str:
        """A caption with attributes dropped at random, none when `complete`.

        Without `seed` it is the scene's own.
        """
        rng = Random(f"caption {self.seed if seed is None else seed}")
        caption, _ = describe_scene(self, rng, complete)
        return caption


def scene(seed: int) -> Scene:
    """The scene of a seed.

    Composites come more often than single shapes, places in a quarter of the scenes.
    """
    rng = Random(f"scene {seed}")
    chance, name = rng.random(), rng.choice(tuple(SIMPLE_SHAPES))
    for composite, share in COMPOSITE_SHARE.items():
        if 0 <= chance < share:
            name = composite
        chance -= share
    background = rng.choice(tuple(PLACES)) if rng.random() < 0.25 else rng.choice(tuple(COLORS))
    style = "place" if background in PLACES else rng.choice(("plain", *STYLES))
    banned = PLACES[background][1] if background in PLACES else (background,)
    color = rng.choice([c for c in COLORS if c not in banned])
    texture = "plain" if name == "emblem" else rng.choice(("plain", "plain", *TEXTURES))
    position = "center" if rng.random() < 0.3 else rng.choice(tuple(POSITIONS))
    size = rng.choice(("small", "large", "large"))
    return Scene(seed, name, color, texture, size, position, background, style)


def article(words: str) -> str:
    """`words` after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def background_phrase(background: str, style: str | None) -> str:
    """ "on a red striped background", "at night", ...; `style` None names no pattern."""
    if background in PLACES:
        return PLACES[background][0]
    words = background
    if style == "plain":
        words = f"plain {background}"
    elif style:
        words = f"{background} {style}"
    return f"on {article(words)} background"


def describe_scene(s: Scene, rng: Random, complete: bool = False) -> tuple[str, dict[str, str]]:
    """A caption and the attributes it states.

    Even a complete caption may leave out a centered position and a plain texture.
    """

    def states(chance: float) -> bool:
        return rng.random() < chance or complete

    said = {"object": s.object}
    if states(0.93):
        said["color"] = s.color
    if states(0.8) and s.texture != "plain":
        said["texture"] = s.texture
    if states(0.5):
        said["size"] = s.size
    if states(0.6) and (s.position != "center" or rng.random() < 0.4):
        said["position"] = s.position
    if states(0.92):
        said["background"] = s.background
        if states(0.8) and s.background not in PLACES:
            said["style"] = s.style
    words = article(" ".join(said[k] for k in ("size", "texture", "color", "object") if k in said))
    if "position" in said:
        words += f" {'in' if s.position == 'center' else 'at'} the {s.position}"
    if "background" in said:
        words += " " + background_phrase(s.background, said.get("style"))
    template = rng.choice(CAPTION_TEMPLATES) if rng.random() < 0.5 else "{}"
    return template.format(words), said


def evaluation_captions(n: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """n complete captions with the attributes they state.

    Objects come in equal shares, seeds are disjoint from pretraining's.
    """
    out: list[tuple[str, dict[str, str]]] = []
    counts = dict.fromkeys(OBJECTS, 0)
    s = 900_000_000 + seed * 1_000_000
    quota = -(-n // len(OBJECTS))
    while len(out) < n:
        candidate = scene(s)
        if counts[candidate.object] < quota:
            counts[candidate.object] += 1
            out.append(describe_scene(candidate, Random(f"evaluation {s}"), complete=True))
        s += 1
    return out


def unrelated_captions() -> list[str]:
    """Captions without creature and emblem, whose images fine-tuning must not change."""
    return [
        "a large red house on a plain white background",
        "a yellow star at night",
        "a large blue fish on a plain pink background",
        "a small purple cat at the left in the snow",
        "a large striped green heart on a plain black background",
        "a white ghost in the desert",
        "a large orange mushroom in a meadow",
        "a pink moon on a blue gradient background",
    ]


def render_scene(s: Scene, size: int = 64) -> Image.Image:
    """The image of a scene, RGB, size x size.

    Drawn larger and averaged down, so edges are smooth.
    """
    rng = Random(f"picture {s.seed}")
    side = size * OVERSAMPLE
    unit = side / 64
    if s.style == "place":
        canvas = draw_place(s.background, side, rng)
    else:
        canvas = draw_backdrop(s.background, s.style, side, rng)
    radius = rng.uniform(*SIZES[s.size])
    if s.object in COMPOSITES and s.size == "small":
        radius += 2.0
    dx, dy = POSITIONS[s.position]
    x = (32 + dx * REACH[s.size] + rng.uniform(-1.5, 1.5)) * unit
    y = (32 + dy * REACH[s.size] + rng.uniform(-1.5, 1.5)) * unit
    palette = {"main": COLORS[s.color], "second": second_color(rng, s.color)}
    mask, details = Image.new("L", (side, side)), Image.new("RGBA", (side, side))
    body = Pen(ImageDraw.Draw(mask), (x, y), radius * unit, 255)
    ink = Pen(ImageDraw.Draw(details), (x, y), radius * unit, palette["main"])
    (SIMPLE_SHAPES | COMPOSITES)[s.object](body, ink, rng, palette)
    canvas.paste(draw_texture(COLORS[s.color], s.texture, side, rng), mask=mask)
    canvas.paste(details, mask=details)
    resampling = Image.Resampling.BOX if OVERSAMPLE < 3 else Image.Resampling.HAMMING
    return canvas.resize((size, size), resampling)


def draw_texture(color: RGB, texture: str, side: int, rng: Random) -> Image.Image:
    """The object's surface: plain, with broad light stripes, or with large light dots."""
    image = Image.new("RGB", (side, side), color)
    pen, unit, light = ImageDraw.Draw(image), side / 64, lighten(color)
    if texture == "striped":
        upright, start = rng.random() < 0.5, rng.uniform(0, 9)
        for i in range(-1, 8):
            a, b = (start + 9 * i) * unit, (start + 9 * i + 4.5) * unit
            pen.rectangle([a, 0, b, side] if upright else [0, a, side, b], fill=light)
    elif texture == "dotted":
        x0, y0, r = rng.uniform(0, 9), rng.uniform(0, 9), 2.5 * unit
        for i in range(-1, 8):
            for j in range(-1, 8):
                x, y = (x0 + 9 * i + 4.5 * (j % 2)) * unit, (y0 + 8 * j) * unit
                pen.ellipse([x - r, y - r, x + r, y + r], fill=light)
    return image


def draw_backdrop(color_name: str, style: str, side: int, rng: Random) -> Image.Image:
    """A colored background with a coarse pattern in a lighter tone of the same color."""
    color = COLORS[color_name]
    image, unit = Image.new("RGB", (side, side), color), side / 64
    pen, light = ImageDraw.Draw(image), blend(color, lighten(color), 0.75)
    if style == "striped":
        start, slant = rng.uniform(0, 16), rng.choice((0, 64))
        for i in range(-5, 5):
            a, b, lean = (start + 16 * i) * unit, (start + 16 * i + 8) * unit, slant * unit
            pen.polygon([(a, 0), (b, 0), (b + lean, side), (a + lean, side)], fill=light)
    elif style == "checkered":
        x0, y0, cell = rng.uniform(-12, 0), rng.uniform(-12, 0), 12 * unit
        for i in range(8):
            for j in range(i % 2, 8, 2):
                x, y = x0 * unit + i * cell, y0 * unit + j * cell
                pen.rectangle([x, y, x + cell, y + cell], fill=light)
    elif style == "gradient":
        top = blend(color, (255, 255, 255), 0.1)
        bottom = blend(color, (0, 0, 0), 0.45) if color != COLORS["black"] else (120, 120, 130)
        ramp = Image.linear_gradient("L").resize((side, side))
        image = Image.composite(
            Image.new("RGB", image.size, bottom), Image.new("RGB", image.size, top), ramp
        )
    return image


def draw_place(name: str, side: int, rng: Random) -> Image.Image:
    """A place: a sky and a ground with one or two large features."""
    unit = side / 64
    skies = {
        "meadow": (158, 214, 246),
        "night": (22, 26, 74),
        "sea": (150, 212, 250),
        "desert": (252, 214, 160),
        "snow": (176, 196, 222),
    }
    image = Image.new("RGB", (side, side), skies[name])
    pen, level = ImageDraw.Draw(image), rng.uniform(36, 44)

    def oval(x: float, y: float, rx: float, ry: float, fill: RGB) -> None:
        pen.ellipse([(x - rx) * unit, (y - ry) * unit, (x + rx) * unit, (y + ry) * unit], fill=fill)

    if name == "meadow":
        oval(rng.uniform(8, 56), level + 28, 60, 34, (120, 196, 84))
        pen.rectangle([0, (level + 8) * unit, side, side], fill=(98, 178, 70))
    elif name == "night":
        for _ in range(9):
            oval(rng.uniform(2, 62), rng.uniform(2, 46), 1.3, 1.3, (240, 236, 190))
        pen.rectangle([0, (level + 12) * unit, side, side], fill=(38, 52, 60))
    elif name == "sea":
        pen.rectangle([0, level * 0.7 * unit, side, side], fill=(28, 112, 196))
        for row in range(3):
            for i in range(-1, 5):
                x = i * 18 + 9 * (row % 2) + rng.uniform(-1, 1)
                oval(x, level * 0.7 + 9 + row * 12, 6, 1.6, (110, 178, 232))
    elif name == "desert":
        oval(rng.uniform(8, 56), rng.uniform(8, 14), 6, 6, (255, 240, 190))
        oval(rng.uniform(0, 64), level + 26, 52, 30, (232, 178, 96))
        pen.rectangle([0, (level + 8) * unit, side, side], fill=(222, 164, 80))
    elif name == "snow":
        pen.rectangle([0, level * unit, side, side], fill=(244, 248, 252))
        for _ in range(12):
            oval(rng.uniform(2, 62), rng.uniform(2, 58), 1.4, 1.4, (250, 252, 255))
    return image
