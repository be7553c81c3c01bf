"""The files that infer.py writes: their names, and what is checked before an image is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_core.atomic_files import temporary_name
from lora_core.errors import UserError
from lora_core.runs.animations import ENDINGS
from lora_core.runs.destination import check_free_names, check_path_lengths
from lora_core.runs.image_grid import Axis


def image_paths(out: str, count: int) -> list[Path]:
    """OUT, or for several images OUT with _000, _001 ... before the ending."""
    path = Path(out)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{i:03d}{path.suffix}") for i in range(count)]


def check_image_files(out: str, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Raises UserError where the files cannot be written, or would replace others. `out` is --out,
    from which `image_paths` made them.
    """
    endings = (".png", *ENDINGS)
    if Path(out).suffix.lower() not in endings:
        raise UserError(
            f"--out {out} must end in .png, where the recipe is kept in the PNG's text, or for an "
            f"animation in {' or '.join(ENDINGS)}"
        )
    for parent in Path(out).parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"--out {out} lies below {parent}, which is a file; name a folder")
    check_path_lengths("--out", map(temporary_name, paths))
    check_free_names("--out", paths, overwrite=overwrite)


def check_seeds(seed: int, count: int, axes: Sequence[Axis]) -> None:
    """Raises UserError for seeds that torch does not take: `count` from the first one on, and those
    of the axes.
    """
    seeds: list[float] = [seed, seed + count - 1]
    for axis in axes:
        seeds += axis.values if axis.setting == "seed" else []
    if not -(2**63) <= min(seeds) <= max(seeds) < 2**64:
        worst = max(seeds, key=abs)
        raise UserError(f"--seed {worst:g} is out of range; torch takes -2^63 to 2^64 - 1")
