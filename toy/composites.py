"""The two open classes of the toy world: random characters and random badges.

Their names are `creature` and `emblem`. They are the prior from which new characters and logos can
be learned. Two combinations are left out on purpose and reserved for concepts: a creature never has
one eye, antennae and a scarf all at once, and an emblem never carries three petals.
"""

from math import cos, pi, sin
from random import Random

from toy.shapes import COLORS, DARK, LIGHT, RGB, Pen, blend, contrast, lighten, spokes, star_points


def creature(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    """A random character: torso, eyes, headgear, scarf, belly, arms, feet, mouth."""
    main, second = palette["main"], palette["second"]
    headgear = rng.choice(("none", "cat", "round", "antennae", "horns"))
    eyes = rng.choice((1, 1, 2, 2, 3))
    scarf = rng.random() < 0.4 and not (eyes == 1 and headgear == "antennae")
    if rng.random() < 0.6:
        _feet(body, ink, rng, main)
    if rng.random() < 0.5:
        _arms(body, rng)
    _headgear(headgear, body, ink, palette)
    _torso(body, rng)
    if rng.random() < 0.35:
        ink.oval(0, 0.5, 0.36, 0.3, lighten(main))
    if scarf:
        _scarf(ink, rng, second)
    _eyes(ink, rng, eyes, main)
    if not scarf and rng.random() < 0.6:
        _mouth(ink, rng, main)


def _torso(body: Pen, rng: Random) -> None:
    kind = rng.choice(("blob", "box", "pear", "egg", "dome"))
    if kind == "blob":
        body.oval(0, 0.12, 0.72 + 0.1 * rng.random(), 0.72)
    elif kind == "box":
        body.box(-0.66, -0.56, 0.66, 0.84, corner=0.25)
    elif kind == "pear":
        body.dot(0, -0.16, 0.5)
        body.oval(0, 0.38, 0.74, 0.48)
    elif kind == "egg":
        body.oval(0, 0.1, 0.6, 0.78)
    else:
        body.dot(0, 0.02, 0.66)
        body.box(-0.66, 0.02, 0.66, 0.84, corner=0.1)


def _headgear(kind: str, body: Pen, ink: Pen, palette: dict[str, RGB]) -> None:
    for side in (-1, 1):
        if kind == "cat":
            body.poly([(side * 0.62, -0.95), (side * 0.1, -0.45), (side * 0.62, -0.15)])
        elif kind == "round":
            body.dot(side * 0.52, -0.56, 0.28)
        elif kind == "horns":
            ink.poly(
                [(side * 0.56, -1.0), (side * 0.2, -0.52), (side * 0.5, -0.32)], palette["second"]
            )
        elif kind == "antennae":
            body.stroke([(side * 0.22, -0.4), (side * 0.46, -0.86)], 0.13)
            ink.dot(side * 0.48, -0.88, 0.16, palette["second"])


def _feet(body: Pen, ink: Pen, rng: Random, main: RGB) -> None:
    spread = 0.26 + 0.14 * rng.random()
    for side in (-1, 1):
        body.oval(side * spread, 0.86, 0.26, 0.17)


def _arms(body: Pen, rng: Random) -> None:
    lift = rng.choice((-0.32, 0.0, 0.34))
    for side in (-1, 1):
        body.stroke([(side * 0.5, 0.2), (side * 0.94, 0.2 + lift)], 0.2)


def _eyes(ink: Pen, rng: Random, n: int, main: RGB) -> None:
    radius = {1: 0.32, 2: 0.22, 3: 0.17}[n]
    look = rng.choice((-0.3, 0.0, 0.3)) * radius
    white, pupil = (LIGHT, DARK) if main != LIGHT else (DARK, LIGHT)
    for i in range(n):
        x = (i - (n - 1) / 2) * radius * 2.15
        ink.dot(x, -0.16, radius, white)
        ink.dot(x + look, -0.16, radius * 0.52, pupil)


def _scarf(ink: Pen, rng: Random, color: RGB) -> None:
    ink.box(-0.7, 0.22, 0.7, 0.46, color, corner=0.11)
    side = rng.choice((-1, 1))
    ink.poly(
        [(side * 0.2, 0.4), (side * 0.52, 0.4), (side * 0.56, 0.86), (side * 0.24, 0.86)], color
    )


def _mouth(ink: Pen, rng: Random, main: RGB) -> None:
    kind = rng.choice(("smile", "open", "teeth"))
    if kind == "smile":
        ink.wedge(0, 0.3, 0.3, 0, 180, contrast(main))
    elif kind == "open":
        ink.oval(0, 0.42, 0.17, 0.14, contrast(main))
    else:
        ink.box(-0.3, 0.3, 0.3, 0.5, contrast(main) if main == LIGHT else LIGHT)


def emblem(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    """A badge put together at random: a frame in the main color around or under a motif in the
    second one.
    """
    main, second = palette["main"], palette["second"]
    frame = rng.choice(("ring", "ring", "disc", "tile", "shield", "gear"))
    field = LIGHT if main != LIGHT and rng.random() < 0.6 else DARK
    if field == main:
        field = (120, 124, 132)
    if frame in ("ring", "gear"):
        if frame == "gear":
            for x, y in spokes(8, 0.9):
                body.dot(x, y, 0.2)
        body.dot(0, 0, 0.95)
        ink.dot(0, 0, 0.95 - rng.choice((0.16, 0.22, 0.28)), field)
    elif frame == "disc":
        body.dot(0, 0, 0.95)
    elif frame == "tile":
        body.box(-0.86, -0.86, 0.86, 0.86, corner=0.25)
    else:
        body.poly([(-0.85, -0.9), (0.85, -0.9), (0.85, 0.1), (0, 1.02), (-0.85, 0.1)])
    ground = field if frame in ("ring", "gear") else main
    _motif(ink, rng, second if second != ground else contrast(ground), ground)


def _motif(ink: Pen, rng: Random, color: RGB, ground: RGB) -> None:
    kind = rng.choice(
        ("petals", "petals", "cross", "bars", "bolt", "star", "eye", "chevron", "drops")
    )
    if kind == "petals":
        turn = rng.random() * pi
        for x, y in spokes(rng.choice((2, 4, 5, 6)), 0.38, turn):
            petal(ink, x, y, 0.44, 0.21, color)
        if rng.random() < 0.5:
            ink.dot(0, 0, 0.16, contrast(color))
    elif kind == "cross":
        ink.box(-0.16, -0.56, 0.16, 0.56, color)
        ink.box(-0.56, -0.16, 0.56, 0.16, color)
    elif kind == "bars":
        for x in (-0.36, 0.0, 0.36):
            ink.box(x - 0.12, -0.46, x + 0.12, 0.46, color)
    elif kind == "bolt":
        ink.poly(
            [(0.2, -0.62), (-0.38, 0.1), (-0.04, 0.1), (-0.2, 0.62), (0.38, -0.1), (0.04, -0.1)],
            color,
        )
    elif kind == "star":
        n = rng.choice((4, 6))
        ink.poly(star_points(n, 0.62, 0.3), color)
    elif kind == "eye":
        ink.oval(0, 0, 0.56, 0.36, color)
        ink.dot(0, 0, 0.2, contrast(color))
    elif kind == "chevron":
        for y in (-0.22, 0.22):
            ink.stroke([(-0.42, y + 0.2), (0, y - 0.2), (0.42, y + 0.2)], 0.18, color)
    else:
        for x, y in spokes(rng.choice((2, 4, 5)), 0.4, rng.random() * pi):
            ink.dot(x, y, 0.2, color)


def petal(ink: Pen, x: float, y: float, length: float, width: float, fill: RGB) -> None:
    """A pointed ellipse centered at (x, y) whose long axis runs through the origin.

    `length` and `width` are half axes.
    """
    norm = (x * x + y * y) ** 0.5 or 1.0
    ux, uy = x / norm, y / norm
    points = []
    for i in range(24):
        a = 2 * pi * i / 24
        along, across = length * cos(a), width * sin(a) * (1 - 0.25 * abs(cos(a)))
        points.append((x + ux * along - uy * across, y + uy * along + ux * across))
    ink.poly(points, fill)


SECOND_COLORS = tuple(COLORS)
COMPOSITES = {"creature": creature, "emblem": emblem}


def second_color(rng: Random, main: str) -> RGB:
    """The color of scarves, horns and motifs: not the main one, with varied lightness."""
    color = COLORS[rng.choice([name for name in SECOND_COLORS if name != main])]
    return blend(color, rng.choice((DARK, LIGHT)), 0.15 * rng.random())
