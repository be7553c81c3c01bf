"""The objects of the toy world and the pen that draws them.

An object spans about [-1, 1] in x (right) and y (down). Every shape is a function `shape(body, ink,
rng, palette)`: `body` paints the silhouette that carries color and texture, `ink` paints details on
top of it. Strokes stay at 0.12 of the object's radius or more, so they are about two pixels wide at
64 x 64.
"""

import itertools
from collections.abc import Callable
from math import cos, pi, sin
from random import Random

from PIL import ImageDraw

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (218, 38, 42),
    "orange": (250, 138, 22),
    "yellow": (252, 218, 44),
    "green": (46, 160, 66),
    "cyan": (70, 206, 226),
    "blue": (42, 76, 208),
    "purple": (136, 56, 184),
    "pink": (252, 134, 186),
    "white": (246, 246, 246),
    "black": (32, 32, 38),
}
DARK, LIGHT = COLORS["black"], COLORS["white"]


def blend(a: RGB, b: RGB, part: float) -> RGB:
    """`a` moved towards `b` by `part` in [0, 1]."""
    return tuple(round(x + (y - x) * part) for x, y in zip(a, b))  # type: ignore[return-value]


def lighten(color: RGB) -> RGB:
    """A lighter companion of a color for stripes and dots; white gets a grey one."""
    return (196, 200, 208) if min(color) > 225 else blend(color, (255, 255, 255), 0.42)


def contrast(color: RGB) -> RGB:
    """Near-black on light colors and near-white on dark ones."""
    return LIGHT if 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] < 70 else DARK


class Pen:
    """Paints primitives given in object coordinates onto a canvas, with one default fill."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, center: tuple[float, float], radius: float, fill: RGB | int
    ) -> None:
        self.draw, self.center, self.radius, self.fill = draw, center, radius, fill

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Canvas coordinates of the object point (x, y)."""
        return self.center[0] + x * self.radius, self.center[1] + y * self.radius

    def oval(self, x: float, y: float, rx: float, ry: float, fill: RGB | int | None = None) -> None:
        box = [*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)]
        self.draw.ellipse(box, fill=self.fill if fill is None else fill)

    def dot(self, x: float, y: float, r: float, fill: RGB | int | None = None) -> None:
        self.oval(x, y, r, r, fill)

    def box(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: RGB | int | None = None,
        corner: float = 0.0,
    ) -> None:
        box = [*self.at(x0, y0), *self.at(x1, y1)]
        fill = self.fill if fill is None else fill
        self.draw.rounded_rectangle(box, corner * self.radius, fill=fill)

    def poly(self, points: list[tuple[float, float]], fill: RGB | int | None = None) -> None:
        self.draw.polygon([self.at(*p) for p in points], fill=self.fill if fill is None else fill)

    def stroke(
        self, points: list[tuple[float, float]], width: float, fill: RGB | int | None = None
    ) -> None:
        """A polyline with round ends."""
        fill = self.fill if fill is None else fill
        line = [self.at(*p) for p in points]
        self.draw.line(line, fill=fill, width=round(width * self.radius), joint="curve")
        for x, y in (points[0], points[-1]):
            self.dot(x, y, width / 2, fill)

    def wedge(
        self, x: float, y: float, r: float, start: float, end: float, fill: RGB | int | None = None
    ) -> None:
        """A pie slice; degrees clockwise from the positive x axis."""
        box = [*self.at(x - r, y - r), *self.at(x + r, y + r)]
        self.draw.pieslice(box, start, end, fill=self.fill if fill is None else fill)


def spokes(n: int, r: float, turn: float = -pi / 2) -> list[tuple[float, float]]:
    """n points on a circle of radius r, the first at angle `turn`."""
    return [(r * cos(turn + 2 * pi * i / n), r * sin(turn + 2 * pi * i / n)) for i in range(n)]


def star_points(n: int, outer: float, inner: float) -> list[tuple[float, float]]:
    """The 2 n corners of a star, with its tips at radius `outer`."""
    pairs = zip(spokes(n, outer), spokes(n, inner, -pi / 2 + pi / n))
    return list(itertools.chain.from_iterable(pairs))


def circle(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.dot(0, 0, 0.92)


def square(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.box(-0.82, -0.82, 0.82, 0.82)


def triangle(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.poly([(0, -0.95), (1.0, 0.8), (-1.0, 0.8)])


def star(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.poly(star_points(5, 1.08, 0.48))


def heart(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.dot(-0.46, -0.3, 0.5)
    body.dot(0.46, -0.3, 0.5)
    body.poly([(-0.89, -0.05), (-0.4, -0.3), (0.4, -0.3), (0.89, -0.05), (0, 0.98)])


def moon(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.dot(-0.05, 0, 0.98)
    body.dot(0.42, -0.14, 0.78, 0)


def house(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.box(-0.7, -0.15, 0.7, 0.92)
    roof = blend(palette["main"], DARK, 0.55) if palette["main"] != DARK else (120, 120, 128)
    ink.poly([(0, -1.0), (1.0, -0.1), (-1.0, -0.1)], roof)
    ink.box(-0.2, 0.32, 0.2, 0.92, roof)


def tree(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    ink.box(-0.17, 0.4, 0.17, 1.0, (122, 72, 36))
    body.poly([(0, -1.0), (0.62, -0.2), (-0.62, -0.2)])
    body.poly([(0, -0.6), (0.88, 0.52), (-0.88, 0.52)])


def mushroom(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    stem = (255, 240, 206)
    ink.box(-0.3, 0.05, 0.3, 0.98, stem, corner=0.2)
    body.wedge(0, 0.12, 0.98, 180, 360)
    spot = contrast(palette["main"]) if palette["main"] == LIGHT else LIGHT
    for x, y, r in ((-0.5, -0.2, 0.17), (0.05, -0.5, 0.19), (0.52, -0.15, 0.16)):
        ink.dot(x, y, r, spot)


def fish(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.oval(-0.2, 0, 0.78, 0.56)
    body.poly([(0.35, 0), (1.0, -0.6), (1.0, 0.6)])
    body.poly([(-0.35, -0.45), (0.25, -0.85), (0.2, -0.35)])
    ink.dot(-0.56, -0.12, 0.17, LIGHT)
    ink.dot(-0.59, -0.12, 0.09, DARK)


def cat(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.oval(0, 0.15, 0.92, 0.76)
    body.poly([(-0.88, -1.0), (-0.2, -0.5), (-0.85, 0.1)])
    body.poly([(0.88, -1.0), (0.2, -0.5), (0.85, 0.1)])
    mark = contrast(palette["main"])
    for side in (-1, 1):
        ink.oval(side * 0.38, 0.02, 0.13, 0.19, mark)
        ink.stroke([(side * 0.55, 0.42), (side * 1.02, 0.36)], 0.11, mark)
    ink.poly(
        [(-0.14, 0.3), (0.14, 0.3), (0, 0.47)],
        (244, 150, 160) if palette["main"] != COLORS["pink"] else mark,
    )


def ghost(body: Pen, ink: Pen, rng: Random, palette: dict[str, RGB]) -> None:
    body.dot(0, -0.22, 0.76)
    body.box(-0.76, -0.22, 0.76, 0.72)
    for x in (-0.507, 0.0, 0.507):
        body.dot(x, 0.72, 0.253)
    mark = contrast(palette["main"])
    ink.oval(-0.28, -0.25, 0.15, 0.21, mark)
    ink.oval(0.28, -0.25, 0.15, 0.21, mark)
    ink.oval(0, 0.22, 0.14, 0.14, mark)


SIMPLE_SHAPES: dict[str, Callable[[Pen, Pen, Random, dict[str, RGB]], None]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "moon": moon,
    "house": house,
    "tree": tree,
    "mushroom": mushroom,
    "fish": fish,
    "cat": cat,
    "ghost": ghost,
}
