"""Learning rates of a UNet's blocks as kohya's network_args give them: lists or named curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from lora_core.adapters.targets import matches_pattern
from lora_core.errors import UserError
from lora_core.text import is_number

# Curve -> weight at x, which goes from 0 in the first block of a list to 1 in its last.
CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
    "sine": lambda x: math.sin(math.pi * x / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


def parse_rate_list(text: str, count: int, option: str) -> list[float]:
    """`count` weights of blocks: "1,0.5,..." or a curve with a base, such as "sine+0.25".

    An empty place is 0, missing ones at the end are 1 and further ones are dropped, as in
    sd-scripts. Raises UserError for anything else.
    """
    name, _, base = text.partition("+")
    if name in CURVES and (not base or is_number(base)):
        last = max(1, count - 1)
        return [CURVES[name](i / last) + float(base or 0) for i in range(count)]
    places = [place.strip() for place in text.split(",")]
    if not all(not place or is_number(place) for place in places):
        raise UserError(
            f"{option} is {text!r}; expected numbers with commas between them, or one of "
            f"{', '.join(CURVES)}, with a base as in sine+0.25"
        )
    weights = [float(place or 0) for place in places][:count]
    return weights + [1.0] * (count - len(weights))


def block_globs(count: int) -> tuple[list[tuple[str, ...]], ...]:
    """Globs of the blocks of each list, down, mid and up, as sd-scripts counts them.

    `count` is the length of the first and third list: 12 (SD 1.x and 2.x, where mid is one block)
    or 9 (SDXL, where it has three). The first of down is conv_in.
    """

    def side(name: str, count: int) -> list[tuple[str, ...]]:
        globs: list[tuple[str, ...]] = []
        for number in range(count):
            block, place = divmod(number, 3)
            kinds = ("attentions", "resnets")
            inside = [f"{name}_blocks.{block}.{kind}.{place}.*" for kind in kinds]
            if place == 2:
                inside.append(f"{name}_blocks.{block}.{name}samplers.*")
            globs.append(tuple(inside))
        return globs

    mid = ["mid_block.*"]
    if count == 9:
        mid = [f"mid_block.{part}.*" for part in ("resnets.0", "attentions.0", "resnets.1")]
    down = [("conv_in",), *side("down", count - 1)]
    return down, [(glob,) for glob in mid], side("up", count)


def block_rate_patterns(
    weights: Sequence[str | None], count: int, paths: Iterable[str], *, threshold: float = 0.0
) -> tuple[dict[str, float], list[str]]:
    """(--optimizer.lr-pattern, --adapter.exclude) of kohya's down, mid and up_lr_weight.

    `weights` are the three texts, None where one is not given (all 1); `paths` those of the layers
    that are to have adapters, so that no glob is left that matches nothing. Blocks with a weight of
    at most `threshold` (block_lr_zero_threshold) get no adapter.
    """
    known = list(paths)
    rates: dict[str, float] = {}
    excluded: list[str] = []
    names = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
    for text, name, blocks in zip(weights, names, block_globs(count), strict=True):
        if text is None:
            continue
        own = parse_rate_list(text, len(blocks), name)
        for weight, globs in zip(own, blocks, strict=True):
            for glob in globs:
                if not any(matches_pattern(path, glob) for path in known):
                    continue
                if weight <= threshold:
                    excluded.append(glob)
                elif weight != 1:
                    rates[glob] = weight
    return rates, excluded
