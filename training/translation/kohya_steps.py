"""How many batches an epoch of kohya's has, and its epochs in steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_core.data.buckets import Size, cut_size
from lora_core.data.listing import list_one_folder
from lora_core.errors import UserError
from lora_core.settings import ImageSettings
from training.inputs.subsets import fill_up
from training.translation.kohya_dataset import ForeignSubset
from training.translation.translated_options import TranslatedOptions


def count_batches(subsets: Sequence[ForeignSubset], settings: ImageSettings, batch: int) -> int:
    """Batches of an epoch: of each bucket of each data set, the last one with fewer images.

    Regularization images are as many as the others. Raises UserError for a folder without images.
    """
    batches = 0
    for number in dict.fromkeys(subset.dataset for subset in subsets):
        own = [subset for subset in subsets if subset.dataset == number]
        images = _list_visits([subset for subset in own if not subset["is_reg"]])
        regular = _list_visits([subset for subset in own if subset["is_reg"]])
        if regular:
            images += fill_up(regular, len(images))
        sizes = {path: _bucket(path, settings) for path in dict.fromkeys(images)}
        counts = Counter(sizes[path] for path in images)
        batches += sum(math.ceil(count / batch) for count in counts.values())
    return batches


def _list_visits(subsets: Sequence[ForeignSubset]) -> list[Path]:
    """The images of the subsets, each as often as an epoch has it."""
    found: list[Path] = []
    for subset in subsets:
        folder = Path(subset["image_dir"])
        if not folder.is_dir():
            raise UserError(f"the image folder {folder} does not exist; check the path")
        images = list(list_one_folder(folder).images)
        if not images:
            raise UserError(f"no images in {folder} that can be read; check the path")
        found += images * int(subset["num_repeats"])
    return found


def _bucket(path: Path, settings: ImageSettings) -> Size:
    if not settings.buckets:
        return settings.resolution, settings.resolution
    with Image.open(path) as image:
        return cut_size(settings, (image.height, image.width), path)


def translate_length(
    options: TranslatedOptions, batches: int, processes: int = 1
) -> tuple[int, int]:
    """Record steps and accumulation; returns (steps of the run, of an epoch).

    max_train_epochs wins over max_train_steps: epochs x ceil(batches / processes / accumulation).
    """
    accumulation = int(options["gradient_accumulation_steps"])
    epoch = math.ceil(batches / processes / accumulation)
    epochs = options["max_train_epochs"]
    steps = int(epochs) * epoch if epochs else int(options["max_train_steps"])
    if epochs:
        words = f"{int(epochs)} epochs of {batches} batches"
        options.take("max_train_epochs", {"stages.0.steps": steps}, words)
        if options.is_given("max_train_steps"):
            options.ignore("max_train_steps", "max_train_epochs wins")
    else:
        options.take("max_train_steps", {"stages.0.steps": steps})
    if options.is_given("gradient_accumulation_steps"):
        options.take("gradient_accumulation_steps", {"accumulation": accumulation})
    return steps, epoch
