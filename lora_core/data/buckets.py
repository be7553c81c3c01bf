"""Aspect-ratio buckets: sizes that images are cropped to, near their own aspect ratios."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from lora_core.errors import UserError
from lora_core.settings import ImageSettings

Size = tuple[int, int]  # h, w in pixels


@lru_cache(maxsize=8)
def bucket_sizes(
    resolution: int, step: int, shortest: int = 0, longest: int = 0
) -> tuple[Size, ...]:
    """The bucket sizes (h, w) of about resolution^2 pixels, sorted.

    They are the square, and for each side the longest other side, both multiples of `step`. No area
    exceeds resolution^2; sides lie between `shortest` (rounded down to the step; 0: resolution / 2,
    rounded to it) and `longest` (rounded up; 0: 2 resolution). With both, and at 512 and 64
    without, these are the sizes of kohya's sd-scripts (its own limits are 256 to 1024). Sizes that
    fit inside another of the same side are left out: they would only throw pixels away. Raises
    UserError for a resolution below the step.
    """
    if step < 1 or resolution < step:
        raise UserError(
            "expected a bucket step of at least 1 and at most the resolution, "
            f"got step {step} at resolution {resolution}"
        )
    square = resolution // step * step
    low = max(step, (resolution // 2 + step // 2) // step * step)
    high = 2 * resolution // step * step
    if shortest:
        low = max(step, shortest // step * step)
    if longest:
        high = -(-longest // step) * step
    found = {(square, square)}
    for side in range(low, high + 1, step):
        other = min(high, resolution**2 // side // step * step)
        if other >= low:
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))


def nearest_size(size: Size, choice: Sequence[Size]) -> Size:
    """The size in `choice` that is nearest to an image's aspect ratio.

    The image's own size if that is there, else the one with the least |difference of log aspects|.
    Ties go to the larger area, then to the first. Logarithms treat wide and tall images alike,
    where kohya's difference of w / h prefers tall buckets. They are compared as exact fractions, so
    that no rounding decides.
    """
    if size in choice:
        return size

    def distance(other: Size) -> tuple[Fraction, int]:
        left, right = size[0] * other[1], size[1] * other[0]
        return Fraction(max(left, right), min(left, right)), -math.prod(other)

    return min(choice, key=distance)


def cut_size(settings: ImageSettings, image: Size, name: object = "an image") -> Size:
    """The (h, w) that an image of (h, w) is cut to.

    Raises UserError, with its `name`, for one that is smaller than a step and not to be enlarged.
    """
    s = settings
    if not s.buckets:
        return s.resolution, s.resolution
    if s.bucket_upscale:
        sizes = bucket_sizes(s.resolution, s.bucket_step, s.bucket_min, s.bucket_max)
        return nearest_size(image, sizes)
    kept = kept_size(s, image)
    h, w = (side // s.bucket_step * s.bucket_step for side in kept)
    if not (h and w):
        raise UserError(
            f"{name} has {kept[1]} x {kept[0]} pixels at --data.resolution {s.resolution}, less "
            f"than --data.bucket-step {s.bucket_step} on a side, and --data.no-bucket-upscale does "
            "not enlarge it; lower the step or leave the image out"
        )
    return h, w


def kept_size(settings: ImageSettings, image: Size) -> Size:
    """The (h, w) that an image of (h, w) is scaled to before it is cut, where none is enlarged.

    Its own where that has at most resolution^2 pixels; else about so many, with one side a multiple
    of the step: the side with which the bucket's aspect is nearer to the image's. This is the rule
    of sd-scripts' BucketManager with no_upscale, in its own floating-point arithmetic.
    """
    h, w = image
    area = settings.resolution**2
    if h * w <= area:
        return image
    aspect = w / h
    wide = math.sqrt(area * aspect)
    by_width = _round_down(wide, settings.bucket_step)
    other_height = _round_down(by_width / aspect, settings.bucket_step)
    by_height = _round_down(area / wide, settings.bucket_step)
    other_width = _round_down(by_height * aspect, settings.bucket_step)
    sizes: list[tuple[float, Size]] = []
    if other_height:
        error = abs(by_width / other_height - aspect)
        sizes.append((error, (int(by_width / aspect + 0.5), by_width)))
    if by_height:
        error = abs(other_width / by_height - aspect)
        sizes.append((error, (by_height, int(by_height * aspect + 0.5))))
    if not sizes:  # the shorter side is below a step, which `cut_size` refuses
        return int(area / wide + 0.5), by_width
    return min(reversed(sizes), key=lambda pair: pair[0])[1]


def _round_down(side: float, step: int) -> int:
    """A side, rounded to whole pixels, then down to a multiple of the step."""
    pixels = int(side + 0.5)
    return pixels - pixels % step


def describe_buckets(cuts: Sequence[Size], batch: int, unit: str = "image") -> str:
    """The sizes of an epoch's batches, a line for each size; one line for one size.

    `cuts` has the size of every image (or other `unit`), repeats included.
    """
    lines = []
    for (h, w), count in sorted(Counter(cuts).items()):
        number = -(-count // batch)
        images = f"{count} {unit}{'s' * (count != 1)}"
        batches = f"{number} batch{'es' * (number > 1)} of {batch}"
        lines.append(f"{w} x {h}: {images} in {batches}{_describe_visits(count, number * batch)}")
    if len(lines) == 1:
        return f"one bucket, {lines[0]}"
    head = f"{len(lines)} buckets (width x height), each visited whole in an epoch:"
    return "\n  ".join([head, *lines])


def _describe_visits(count: int, visits: int) -> str:
    """How often an epoch of so many visits has each of `count` images; "" for once."""
    each, more = divmod(visits, count)
    if not more:
        some = "each " if count > 1 else ""
        return f", {some}{_times(each)}" if each > 1 else ""
    least = f", {count - more} of them {_times(each)}" if each > 1 else ""
    return f"{least}, {more} of them {_times(each + 1)}"


def _times(number: int) -> str:
    return "twice" if number == 2 else f"{number} times"
