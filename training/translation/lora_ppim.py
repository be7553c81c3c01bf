"""cloneofsimo's lora_ppim: a folder of images with captions and masks, as lora_pti reads it.

    lora_ppim photos prepared --target_prompts "a face" --target_size 512

It writes 0.src.jpg, 0.mask.png, 1.src.jpg ... and caption.txt, a line for each image, into a new
folder; `lora_pti --use_mask_captioned_data` trains on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from lora_core.data.images import MASK_SUFFIX, image_to_tensor, read_image
from lora_core.errors import UserError
from lora_core.flags.fire_words import REQUIRED, parse_fire_words
from lora_core.progress import track
from lora_core.text import print_escaped, shorten_value
from models import choose_device
from training.inputs.annotators import WEIGHTS, Annotator, open_captioner, open_masker
from training.inputs.mask_files import save_mask
from training.inputs.prepared_files import describe_whiteness

IMAGES = (".png", ".jpg")  # the suffixes that lora_ppim looks for in a folder
JPEG_QUALITY = 99
ARGUMENTS: dict[str, Any] = {
    "files": REQUIRED,
    "output_dir": REQUIRED,
    "caption_text": None,
    "target_prompts": None,
    "target_size": 512,
    "crop_based_on_salience": True,
    "use_face_detection_instead": False,
    "temp": 1.0,
    "n_length": -1,
    # ours
    "caption_model": WEIGHTS["blip"],
    "mask_model": WEIGHTS["clipseg"],
    "face_model": WEIGHTS["face"],
    "device": "auto",
    "overwrite": False,
}
HELP = f"""lora_ppim FILES OUTPUT_DIR <flags>: captions and masks for lora_pti, by models

  FILES                         a folder, of which all .png and .jpg are taken, or [a.png,b.jpg]
  OUTPUT_DIR                    a new folder for 0.src.jpg, 0.mask.png ... and caption.txt
  --caption_text TEXT           what each caption begins with
  --target_prompts TEXT         what masks show, one text or a list; default: the captions
  --target_size N               side of the images, pixels (512)
  --crop_based_on_salience B    cut the square around the mask's center of mass (True)
  --use_face_detection_instead  boxes around faces instead of CLIPSeg's masks (False)
  --temp T                      above 1 masks become softer (1.0)
  --n_length N                  only the first N images (-1: all)
of this project:
  --caption_model MODEL         folder or hub id of a BLIP or Florence-2 model
                                ({WEIGHTS["blip"]})
  --mask_model MODEL            of a CLIPSeg model ({WEIGHTS["clipseg"]})
  --face_model MODEL            of an OWL-ViT model ({WEIGHTS["face"]})
  --device NAME                 cpu, cuda:0 ...; auto: cuda where there is one
  --overwrite                   replace files that are in OUTPUT_DIR

example: lora_ppim photos prepared --target_prompts "a face" """


class PreparedImage(NamedTuple):
    """One image of the new folder."""

    image: Image.Image
    mask: Image.Image
    caption: str


@dataclass(frozen=True)
class PreparationJob:
    """The arguments of lora_ppim."""

    files: tuple[Path, ...]
    output_dir: Path
    caption_text: str
    target_prompts: tuple[str, ...]  # of each image; empty: the captions
    target_size: int
    crop_based_on_salience: bool
    temp: float
    captioner: Annotator
    masker: Annotator
    device: str
    overwrite: bool


def run_lora_ppim(words: Sequence[str]) -> None:
    """Write the folder of one command line. Raises UserError before anything is written."""
    job = read_job(parse_fire_words(words, ARGUMENTS, "lora_ppim"))
    _check_output(job)
    prepared = prepare_images(job)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(prepared):
        each.image.save(job.output_dir / f"{number}.src.jpg", quality=JPEG_QUALITY)
        save_mask(each.mask, job.output_dir / f"{number}.mask.png")
        print_escaped(
            f"written: {number}.src.jpg, {number}.mask.png ({describe_whiteness(each.mask)})"
        )
    captions = "".join(f"{each.caption}\n" for each in prepared)
    (job.output_dir / "caption.txt").write_text(captions, encoding="utf-8")
    print_escaped(f"written: {job.output_dir / 'caption.txt'}, a line for each image")
    print("edit captions and masks there, then: lora_pti --use_mask_captioned_data")


def read_job(given: dict[str, Any]) -> PreparationJob:
    """The job of parsed arguments. Raises UserError for values that cannot be carried out."""
    values = ARGUMENTS | given
    size, temp, count = values["target_size"], values["temp"], values["n_length"]
    if size < 1 or temp <= 0 or (count < 1 and count != -1):
        raise UserError(
            f"--target_size is {size}, --temp {temp:g} and --n_length {count}; expected a size "
            "of at least 1, a number above 0, and a number of images or -1 for all"
        )
    files = _list_files(values["files"], count)
    prompts = values["target_prompts"]
    listed = [prompts] * len(files) if isinstance(prompts, str) else list(prompts or ())
    if listed and len(listed) != len(files):
        raise UserError(
            f"--target_prompts has {len(listed)} texts for {len(files)} images; give one for all "
            "or one each"
        )
    kind = "face" if values["use_face_detection_instead"] else "clipseg"
    if kind == "face" and (listed or "temp" in given):
        raise UserError(
            "--target_prompts and --temp have no effect on boxes around faces; leave them out, or "
            "--use_face_detection_instead"
        )
    return PreparationJob(
        tuple(files),
        Path(values["output_dir"]),
        str(values["caption_text"] or ""),
        tuple(map(str, listed)),
        size,
        values["crop_based_on_salience"],
        temp,
        Annotator("blip", values["caption_model"]),
        Annotator(kind, values["face_model" if kind == "face" else "mask_model"]),
        values["device"],
        values["overwrite"],
    )


def _list_files(files: Any, count: int) -> list[Path]:
    """The images in their order. Raises UserError where there are none."""
    if isinstance(files, str) and files[:1] == "[":
        files = [part.strip(" '\"") for part in files.strip("[]").split(",")]
    if isinstance(files, str):
        folder = Path(files)
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; give a folder of .png and .jpg, or a list")
        images = sorted(path for path in folder.iterdir() if path.suffix in IMAGES)
        files = [path for path in images if not path.name.endswith(MASK_SUFFIX)]
    found = [Path(file) for file in files]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        what = f"there is no file {missing[0]}" if missing else "there is no .png or .jpg"
        raise UserError(f"{what}; give a folder of images, or a list such as [a.png,b.jpg]")
    return found if count == -1 else found[:count]


def _check_output(job: PreparationJob) -> None:
    """Raises UserError for a folder that has such files already."""
    there = [job.output_dir / "caption.txt", *job.output_dir.glob("*.src.jpg")]
    existing = [path for path in there if path.exists()]
    if existing and not job.overwrite:
        raise UserError(
            f"{existing[0]} exists and may have been edited; give another OUTPUT_DIR, or "
            "--overwrite"
        )


def prepare_images(job: PreparationJob) -> list[PreparedImage]:
    """The images, masks and captions of a job. Raises UserError for an image without a find."""
    device = choose_device(job.device)
    images = [read_image(path).image for path in job.files]
    captioner = open_captioner(job.captioner, device)
    captions = []
    for image in track(images, "captions", "image", len(images)):
        captions.append(captioner.describe(image, job.caption_text))
    prompts = job.target_prompts or captions
    find = _bind_masker(job, device)
    prepared = []
    for number, image in enumerate(track(images, "masks", "image", len(images))):
        mask = find(image, prompts[number])
        if mask is None:
            raise UserError(
                f"{job.masker.kind} finds nothing in {job.files[number]}"
                f"{'' if job.masker.kind == 'face' else f' like {shorten_value(prompts[number])}'}"
                "; leave the image out or give other --target_prompts"
            )
        center = mask_center(mask)
        if not job.crop_based_on_salience:
            center = (image.width / 2, image.height / 2)
        square = [crop_square(each, center, job.target_size) for each in (image, mask)]
        prepared.append(PreparedImage(square[0], square[1], captions[number]))
    small = sum(min(image.size) < job.target_size for image in images)
    if small:
        print(
            f"note: {small} of {len(images)} images have a side below {job.target_size} pixels and "
            "were enlarged by interpolation; lora_ppim first doubles those by Swin2SR"
        )
    return prepared


def _bind_masker(
    job: PreparationJob, device: torch.device
) -> Callable[[Image.Image, str], Image.Image | None]:
    masker: Any = open_masker(job.masker, device)
    if job.masker.kind == "face":
        return lambda image, _: masker.find(image)
    return lambda image, words: masker.find(image, words, job.temp)


def mask_center(mask: Image.Image) -> tuple[float, float]:
    """The center of mass (x, y) of a mask, in pixels."""
    levels = image_to_tensor(mask)[0].double()
    total = levels.sum()
    x = torch.arange(mask.width, dtype=torch.float64)
    y = torch.arange(mask.height, dtype=torch.float64)
    return float(levels.sum(0) @ x / total), float(levels.sum(1) @ y / total)


def crop_square(image: Image.Image, center: tuple[float, float], side: int) -> Image.Image:
    """The largest square around a center, moved into the image, resized to `side` pixels."""
    width, height = image.size
    short = min(width, height)
    left = min(max(center[0] - short / 2, 0), width - short)
    top = min(max(center[1] - short / 2, 0), height - short)
    box = (round(left), round(top), round(left) + short, round(top) + short)
    return image.crop(box).resize((side, side), Image.Resampling.LANCZOS)
