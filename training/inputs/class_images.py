"""Class images of prior preservation (DreamBooth, arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from lora_core import distributed
from lora_core.config import PriorConfig
from lora_core.data import dataset
from lora_core.data.dataset import ImageDataset
from lora_core.data.listing import folder_for_new_images
from lora_core.errors import UserError
from lora_core.progress import ProgressBar
from lora_core.runs.pictures import save_png

# Drawn together, network by network, in each process; those of an interruption are lost.
AT_ONCE = 8


def check_class_folder(given: str, images: str) -> None:
    """Raises UserError for a folder of class images that is a file, or the folder of the training
    `images`; needs no model.
    """
    if not given or not Path(given).exists():
        return
    if not Path(given).is_dir():
        raise UserError(
            f"--prior.images {given} is a file, not a folder; give the folder of the class images"
        )
    if Path(images).exists() and Path(given).samefile(images):
        raise UserError(
            f"--prior.images {given} is the folder of the training images, among which class "
            "images would be drawn; give another folder or leave it out"
        )
    folder_for_new_images(Path(given))


def open_class_images(
    prior: PriorConfig,
    run_folder: Path,
    training: ImageDataset,
    draw: Callable[[Sequence[int]], list[Image.Image]],
) -> ImageDataset | None:
    """The class images, cropped like those of `training`; None without a class prompt. Missing
    images are generated: `draw` takes seeds and gives the base model's images for the class
    prompt.
    """
    if not prior.prompt:
        return None
    folder = Path(prior.images) if prior.images else run_folder / "class_images"
    with distributed.main_process_first():
        folder.mkdir(parents=True, exist_ok=True)
    place, there = folder_for_new_images(folder)
    if there > prior.count:
        print(
            f"class images: all {there} of {folder}; "
            f"--prior.count {prior.count} is the least number"
        )
    missing = [seed for seed in range(prior.count) if not _image_file(place, seed).exists()]
    missing = distributed.read_once(lambda: missing[: max(0, prior.count - there)])
    at_once = AT_ONCE * distributed.process_count()
    with ProgressBar("class images", len(missing), "image") as bar:
        for i in range(0, len(missing), at_once):
            seeds = missing[i : i + at_once]
            own = distributed.take_share(seeds, even=True)
            drawn = distributed.gather_shares(draw(own))
            if distributed.is_main_process():
                for seed, image in zip(seeds, drawn):
                    save_png(image, _image_file(place, seed))
            bar.advance(len(seeds))
    distributed.wait_for_all()
    records = dataset.scan_folder(
        folder, captions="one", caption=prior.prompt, masks="none", is_prior=True
    )
    return ImageDataset(records, training.settings, seed=training.seed)


def _image_file(folder: Path, seed: int) -> Path:
    return folder / f"{seed:05d}.png"
