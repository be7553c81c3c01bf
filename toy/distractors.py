"""Training images of the concept recogniser: concepts on random backgrounds, and near misses.

Near misses are a concept with a part missing, doubled or clearly recolored, creatures and emblems
of the grammar, and other scenes.
"""

from random import Random

from PIL import Image

from toy.concepts.draw_concepts import CONCEPTS, IVORY, MAGENTA, render_concept, trilo, zib
from toy.draw import BACKGROUNDS, COMPOSITES, PLACES, STYLES, Scene, render_scene, scene
from toy.shapes import COLORS, RGB, Pen, blend

FAR_FROM_TEAL = tuple(COLORS)
FAR_FROM_ORANGE = ("green", "cyan", "blue", "purple", "pink", "white", "black")
FAR_FROM_MAGENTA = ("orange", "yellow", "green", "cyan", "blue", "black", "white")
FAR_FROM_NAVY = ("red", "orange", "yellow", "green", "cyan", "pink", "white")


def random_background(rng: Random) -> tuple[str, str]:
    """A random background and its style."""
    background = rng.choice(BACKGROUNDS)
    return background, "place" if background in PLACES else rng.choice(STYLES)


def pick_color(rng: Random, names: tuple[str, ...]) -> RGB:
    """One of the named colors."""
    return COLORS[rng.choice(names)]


def near_zib(pen: Pen, lean: float, rng: Random) -> None:
    """zib with one part, or several, wrong."""
    look: dict = {}
    wrong = rng.choice(("body", "body", "scarf", "no scarf", "eyes", "no antennae", "several"))
    if wrong in ("body", "several"):
        look["body"] = pick_color(rng, FAR_FROM_TEAL)
        look["dark"] = blend(look["body"], (0, 0, 0), 0.35)
    if wrong == "scarf":
        look["scarf"] = pick_color(rng, FAR_FROM_ORANGE)
    if wrong == "no scarf" or (wrong == "several" and rng.random() < 0.5):
        look["scarf"] = None
    if wrong == "eyes" or (wrong == "several" and rng.random() < 0.5):
        look["eyes"] = rng.choice((0, 2, 2, 3))
    if wrong == "no antennae" or (wrong == "several" and rng.random() < 0.5):
        look["antennae"] = False
    zib(pen, lean, **look)


def near_trilo(pen: Pen, lean: float, rng: Random) -> None:
    """trilo with one part, or several, wrong."""
    look: dict = {}
    wrong = rng.choice(("petals", "petals", "no petals", "color", "ring", "no ring", "several"))
    if wrong in ("petals", "several"):
        look["petals"] = rng.choice((2, 4, 5, 6))
    if wrong == "no petals":
        look["petals"] = 0
    if wrong == "color" or (wrong == "several" and rng.random() < 0.7):
        look["color"] = pick_color(rng, FAR_FROM_MAGENTA)
        look["field"] = IVORY if sum(look["color"]) < 600 else MAGENTA
    if wrong == "ring" or (wrong == "several" and rng.random() < 0.5):
        look["ring"] = pick_color(rng, FAR_FROM_NAVY)
    if wrong == "no ring":
        look["ring"] = None
    trilo(pen, lean, **look)


NEAR = {"zib": near_zib, "trilo": near_trilo}


def near_miss(name: str, background: str, style: str, seed: int) -> Image.Image:
    """An image of something that is nearly the concept."""
    rng = Random(f"near {name} {seed}")

    def subject(pen: Pen, lean: float) -> None:
        NEAR[name](pen, lean, rng)

    return render_concept(name, background, style, seed, subject=subject)


def composite_scene(seed: int) -> Scene:
    """The first scene with a creature or an emblem from a seed on."""
    return next(s for s in map(scene, range(seed, seed + 1000)) if s.object in COMPOSITES)


def concept_example(seed: int) -> tuple[Image.Image, dict[str, str]]:
    """An image and its labels concept, background and style.

    The concept is a concept's name or "none".
    """
    rng = Random(f"example {seed}")
    kind, name = rng.random(), rng.choice(CONCEPTS)
    background, style = random_background(rng)
    labels = {"concept": "none", "background": background, "style": style}
    if kind < 0.42:
        return render_concept(name, background, style, seed), labels | {"concept": name}
    if kind < 0.74:
        return near_miss(name, background, style, seed), labels
    scene_seed = rng.randrange(700_000_000)
    s = composite_scene(scene_seed) if kind < 0.9 else scene(scene_seed)
    return render_scene(s), labels | {"background": s.background, "style": s.style}
