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
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """The bucket sizes (h, w) of about resolution^2 pixels, sorted.

    They are the square, and for each side the longest other side, both multiples of `step`. No area
    exceeds resolution^2; sides lie between resolution / 2 (rounded to the step) and 2 resolution.
    At 512 and 64 these are the sizes of kohya's sd-scripts (256 to 1024). Sizes that fit inside
    another of the same side are left out: they would only throw pixels away. Raises UserError for a
    resolution below the step.
    """
    if step < 1 or resolution < step:
        raise UserError(
            "expected a bucket step of at least 1 and at most the resolution, "
            f"got step {step} at resolution {resolution}"
        )
    square = resolution // step * step
    low = max(step, (resolution // 2 + step // 2) // step * step)
    high = 2 * resolution // step * step
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


def cut_size(settings: ImageSettings, image: Size) -> Size:
    """The (h, w) that an image of (h, w) is cut to."""
    if not settings.buckets:
        return settings.resolution, settings.resolution
    return nearest_size(image, bucket_sizes(settings.resolution, settings.bucket_step))


def describe_buckets(cuts: Sequence[Size], batch: int, unit: str = "image") -> str:
    """The sizes of an epoch's batches, a line for each size; one line for one size.

    `cuts` has the size of every image (or other `unit`), repeats included.
    """
    lines = []
    for (h, w), count in sorted(Counter(cuts).items()):
        more = -count % batch
        filled = f" and {more} more visit{'s' * (more != 1)}" if more else ""
        images = f"{count} {unit}{'s' * (count != 1)}{filled}"
        batches = f"{(count + more) // batch} batch{'es' * (count > batch)}"
        lines.append(f"{w} x {h}: {images} in {batches}")
    if len(lines) == 1:
        return f"one bucket, {lines[0]}"
    head = f"{len(lines)} buckets (width x height), each visited whole in an epoch:"
    return "\n  ".join([head, *lines])
