"""Class images of prior preservation (DreamBooth, arXiv 2208.12242). Functions of an open Session."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lora_core.data import dataset
from lora_core.data.dataset import ImageDataset
from lora_core.data.listing import folder_for_new_images
from lora_core.diffusion import generation
from lora_core.errors import UserError
from lora_core.runs.pictures import save_png, to_images

if TYPE_CHECKING:
    from training.setup import Session


def check_class_folder(given: str, images: str) -> None:
    """Raises UserError for a folder of class images that cannot be read, or that holds the training `images`; needs no model."""
    if not given or not Path(given).exists():
        return
    if not Path(given).is_dir():
        raise UserError(
            f"--prior.images {given} is a file, not a folder; give the folder of the class images"
        )
    if Path(given).samefile(images):
        sentence = f"--prior.images {given} is the folder of the training images, among which class images would be drawn"
        raise UserError(f"{sentence}; give another folder or leave it out")
    folder_for_new_images(Path(given))


def open_class_images(s: Session) -> ImageDataset | None:
    """The class images, None without a class prompt; missing ones are drawn by the base model, one seed each."""
    p = s.config.prior
    if not p.prompt:
        return None
    folder = Path(p.images) if p.images else s.run.folder / "class_images"
    folder.mkdir(parents=True, exist_ok=True)
    place, there = folder_for_new_images(folder)
    if there > p.count:
        print(
            f"class images: all {there} of {folder}; --prior.count {p.count} is how many there are to be at least"
        )
    seeds = [seed for seed in range(p.count) if not (place / f"{seed:05d}.png").exists()]
    with s.evaluating():
        for seed in tqdm(
            seeds[: max(0, p.count - there)], desc="class images", disable=not sys.stderr.isatty()
        ):
            drawn = generation.generate_images(
                s.family, [p.prompt], [seed], s.recipe, **s.hole(seed)
            )
            save_png(to_images(drawn)[0], place / f"{seed:05d}.png")
    records = dataset.scan_folder(
        folder, captions="one", caption=p.prompt, masks="none", is_prior=True
    )
    return ImageDataset(records, s.folder.settings, seed=s.folder.seed)
