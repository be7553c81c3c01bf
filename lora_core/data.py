"""A folder of images -> Record -> Example -> Batch, with every random choice keyed by the example (seed, key, visit, purpose).

So an example looks the same for any batch size, worker count or resume point, and whatever is cached from it is keyed by its content.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_core.cache import Cache
from lora_core.captions import TEMPLATES, CaptionMode, read_captions, read_metadata
from lora_core.errors import UserError
from lora_core.images import MASK_SUFFIX, Picture, RecentPictures, cut, flip, list_images, mask_path, read_picture, resize, tint, to_pixels, to_tensor
from lora_core.noise import generator
from lora_core.tokens import has_word

__all__ = [
    "TEMPLATES", "Batch", "Cache", "Example", "Folder", "ImageSettings", "Record", "batches", "collate", "missing_word", "position", "scan",
]  # fmt: skip

JITTER = 0.1  # brightness and contrast within +-10 %, as cloneofsimo's color_jitter


@dataclass(frozen=True)
class Record:
    """One image on disk."""

    path: Path
    captions: tuple[str, ...]
    mask_path: Path | None
    use_alpha: bool
    key: str  # hash of the image's bytes, its mask's, and whether alpha is the mask
    is_prior: bool = False


@dataclass(frozen=True, eq=False)
class Example:
    """One visit to one image."""

    pixels: Tensor  # [3, h, w] in [-1, 1]
    mask: Tensor | None  # [1, h, w] in [0, 1]
    caption: str
    original_size: tuple[int, int]  # h, w of the file, upright
    crop: tuple[int, int]  # top, left in the resized (and mirrored, if it was) image
    key: str
    visit: int
    is_prior: bool


@dataclass(frozen=True)
class ImageSettings:
    """How images become squares of `resolution` pixels."""

    resolution: int
    crop: Literal["center", "random"] = "center"
    zoom: float = 1.0  # the short side is scaled to resolution * u, u uniform in [1, zoom], before the crop
    flip: bool = False  # mirrored in half the visits
    jitter: bool = False  # brightness and contrast within +-10 %
    variants: int = 0  # 0: fresh pixels at every visit; n: the pixels of visit mod n, so that latents can be cached
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.zoom < 1 or self.variants < 0:
            raise UserError(f"expected resolution >= 1, zoom >= 1, variants >= 0, got {self.resolution}, {self.zoom}, {self.variants}")
        if self.crop not in ("center", "random"):
            raise UserError(f"unknown crop {self.crop!r}, expected center or random")

    @property
    def is_random(self) -> bool:
        """Whether two visits can have different pixels."""
        return self.crop == "random" or self.zoom > 1 or self.flip or self.jitter


@dataclass
class Batch:
    """Examples stacked: instance rows, then as many prior rows if there are class images."""

    pixels: Tensor  # [b, 3, h, w] in [-1, 1]
    mask: Tensor | None  # [b, 1, h, w] in [0, 1]; None when no row has one
    captions: list[str]
    keys: tuple[str, ...]
    visits: tuple[int, ...]
    is_prior: Tensor  # [b] bool
    original_sizes: list[tuple[int, int]]
    crops: list[tuple[int, int]]

    def rows(self, index: slice) -> "Batch":
        """The batch with these rows only."""
        mask = None if self.mask is None else self.mask[index]
        return Batch(
            self.pixels[index], mask, self.captions[index], self.keys[index], self.visits[index],
            self.is_prior[index], self.original_sizes[index], self.crops[index],
        )  # fmt: skip


def scan(
    folder: Path | str,
    *,
    captions: CaptionMode = "auto",
    caption: str | None = None,
    repeats: int = 1,
    masks: Literal["auto", "file", "alpha", "none"] = "auto",
    is_prior: bool = False,
) -> list[Record]:
    """The images of a folder (with metadata.jsonl: also those it names below it) with their captions and masks, the list `repeats` times over.

    Every file is decoded once here, so that a damaged one is refused before any work. Masks: "file" demands 001.mask.png for each image, "alpha"
    demands an alpha channel, "auto" takes mask files where they are and ignores alpha, "none" ignores both. Caption modes: `read_captions`.
    Raises UserError for what is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    if masks not in ("auto", "file", "alpha", "none"):
        raise UserError(f"unknown masks {masks!r}, expected auto, file, alpha or none")
    images = _images(folder, captions)
    if not images:
        raise UserError(f"no images in {folder}; put .jpg, .jpeg, .png, .webp or .bmp files there")
    chosen = _masks(folder, images, masks)
    texts = read_captions(folder, images, captions, caption)
    return [_record(p, texts[p], chosen[p], use_alpha=masks == "alpha", is_prior=is_prior) for p in images] * repeats


def missing_word(records: Sequence[Record], word: str) -> list[Path]:
    """The images with a caption in which `tokens.bind` would not find the word, each once."""
    return list(dict.fromkeys(r.path for r in records if not all(has_word(c, word) for c in r.captions)))


class Folder:
    """Records that can be drawn as examples. Decoded images stay in memory up to 512 MiB."""

    def __init__(self, records: Sequence[Record], settings: ImageSettings) -> None:
        if not records:
            raise UserError("no images to draw from; scan a folder that has some")
        self.records = list(records)
        self.settings = settings
        self._recent = RecentPictures()
        self._copies: Counter[str] = Counter()  # of each content
        self._copy: list[int] = []  # which of them a record is
        for record in self.records:
            self._copy.append(self._copies[record.key])
            self._copies[record.key] += 1

    def __len__(self) -> int:
        return len(self.records)

    def visit(self, index: int, epoch: int) -> int:
        """Which visit to its content record `index` makes in an epoch: copies (repeats, identical files) take turns, so each draws its own noise."""
        return epoch * self._copies[self.records[index].key] + self._copy[index]

    def example(self, index: int, visit: int) -> Example:
        """One visit to a record. Pixels depend on (settings, key, visit), or visit mod variants; the caption always on the visit itself."""
        record, s = self.records[index], self.settings

        def draw(purpose: str) -> float:
            return self._uniform(record, self._variant(visit), purpose)

        side = round(s.resolution * (1 + (s.zoom - 1) * draw("zoom"))) if s.zoom > 1 else s.resolution
        picture = resize(self._picture(record), side)
        if s.flip and draw("flip") < 0.5:
            picture = flip(picture)
        free = (picture.image.height - s.resolution, picture.image.width - s.resolution)
        if s.crop == "random":
            top, left = (int(draw(f"crop {axis}") * (room + 1)) for axis, room in zip(("top", "left"), free, strict=True))
        else:
            top, left = (round(room / 2) for room in free)
        picture = cut(picture, top, left, s.resolution)
        if s.jitter:
            picture = tint(picture, *(1 + JITTER * (2 * draw(what) - 1) for what in ("brightness", "contrast")))
        mask = None if picture.mask is None else to_tensor(picture.mask).div(255)
        caption = record.captions[int(self._uniform(record, visit, "caption") * len(record.captions))]
        pixels = to_pixels(picture.image)
        return Example(pixels, mask, caption, picture.original_size, (top, left), record.key, visit, record.is_prior)

    def cache_key(self, record: Record, visit: int) -> str:
        """A name for what is computed from the pixels of this visit: the content and every setting that changes pixels; captions do not enter.

        Raises UserError when pixels are fresh at every visit, for then nothing would be read twice.
        """
        settings = asdict(self.settings)
        if not self.settings.is_random:
            settings = {"resolution": self.settings.resolution}
        elif not self.settings.variants:
            raise UserError("random crop, zoom, flip or jitter at every visit leaves nothing to cache; set variants, or turn the cache off")
        else:
            del settings["variants"]
            settings["variant"] = self._variant(visit)
        return hashlib.blake2b(json.dumps([record.key, settings], sort_keys=True).encode(), digest_size=16).hexdigest()

    def _variant(self, visit: int) -> int:
        return visit % self.settings.variants if self.settings.variants else visit

    def _uniform(self, record: Record, visit: int, purpose: str) -> float:
        return torch.rand((), generator=generator(self.settings.seed, record.key, visit, purpose), dtype=torch.float64).item()

    def _picture(self, record: Record) -> Picture:
        """The decoded file, already resized where no zoom asks for the original."""

        def read() -> Picture:
            picture = read_picture(record.path, record.mask_path, use_alpha=record.use_alpha)
            return picture if self.settings.zoom > 1 else resize(picture, self.settings.resolution)

        return self._recent.get(record.key, read)


def position(n: int, index: int, seed: int, *, stream: str = "instance") -> tuple[int, int]:
    """(which of n records, epoch) of sample number `index` of the endless stream: every epoch is a permutation keyed by (seed, stream, epoch)."""
    epoch, place = divmod(index, n)
    return _permutation(n, epoch, seed, stream)[place], epoch


def collate(examples: Sequence[Example]) -> Batch:
    """The examples as one batch; rows without a mask get ones when others have one."""
    mask = None
    if any(e.mask is not None for e in examples):
        mask = torch.stack([torch.ones_like(e.pixels[:1]) if e.mask is None else e.mask for e in examples])
    return Batch(
        torch.stack([e.pixels for e in examples]), mask, [e.caption for e in examples], tuple(e.key for e in examples),
        tuple(e.visit for e in examples), torch.tensor([e.is_prior for e in examples]),
        [e.original_size for e in examples], [e.crop for e in examples],
    )  # fmt: skip


def batches(folder: Folder, prior: Folder | None = None, *, batch: int, seed: int, start: int = 0, stop: int, workers: int = 0) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1: step k holds samples k * batch .. (k + 1) * batch - 1, then as many prior ones.

    A step is a function of its number, so threads ahead of the loop (`workers`; 0 makes each batch when it is asked for) change no bit.
    """
    if batch < 1 or workers < 0 or start < 0:
        raise UserError(f"expected batch >= 1, workers >= 0 and start >= 0, got {batch}, {workers} and {start}")
    if prior is not None and not all(r.is_prior for r in prior.records):
        raise ValueError("the prior folder holds records that are not marked as prior; scan it with is_prior=True")
    sources = [(folder, "instance")] if prior is None else [(folder, "instance"), (prior, "prior")]

    def make(step: int) -> Batch:
        return collate([_sample(f, i, seed, stream) for f, stream in sources for i in range(step * batch, (step + 1) * batch)])

    return map(make, range(start, stop)) if workers == 0 else _ahead(make, range(start, stop), workers)


def _sample(folder: Folder, index: int, seed: int, stream: str) -> Example:
    record, epoch = position(len(folder), index, seed, stream=stream)
    return folder.example(record, folder.visit(record, epoch))


def _ahead(make: Callable[[int], Batch], steps: range, workers: int) -> Iterator[Batch]:
    """make(step) in order, up to 2 * workers of them under way in threads (Pillow decodes and resizes outside the interpreter lock)."""
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    try:
        for step in steps:
            pending.append(pool.submit(make, step))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=8)
def _permutation(n: int, epoch: int, seed: int, stream: str) -> list[int]:
    return torch.randperm(n, generator=generator(seed, stream, epoch, "order")).tolist()


def _images(folder: Path, captions: str) -> list[Path]:
    """The folder's images, and those below it that metadata.jsonl names when captions come from there."""
    found = list_images(folder)
    table = folder / "metadata.jsonl"
    if captions in ("auto", "metadata") and table.is_file():
        found += sorted(set(read_metadata(table)) - set(found))
    return found


def _masks(folder: Path, images: list[Path], masks: str) -> dict[Path, Path | None]:
    """The mask file of each image; UserError for a missing one that was demanded, or one that belongs to no image."""
    if masks in ("alpha", "none"):
        return dict.fromkeys(images)
    chosen = {p: mask_path(p) if mask_path(p).is_file() else None for p in images}
    stray = sorted(set(folder.glob("*" + MASK_SUFFIX)) - set(chosen.values()))
    if stray:
        raise UserError(f"the mask {stray[0]} belongs to no image; name it after its image or remove it")
    without = [p for p, mask in chosen.items() if mask is None]
    if masks == "file" and without:
        first = mask_path(without[0]).name
        raise UserError(f"{len(without)} of {len(images)} images lack a mask, first {without[0]}; add {first} or ask for masks 'auto'")
    return chosen


def _record(path: Path, captions: tuple[str, ...], mask: Path | None, *, use_alpha: bool, is_prior: bool) -> Record:
    """The record of one file, which is decoded to see that it can be."""
    read_picture(path, mask, use_alpha=use_alpha)
    content = hashlib.blake2b(path.read_bytes(), digest_size=16)
    content.update(b"alpha" if use_alpha else b"")
    if mask is not None:
        content.update(b"mask" + hashlib.blake2b(mask.read_bytes()).digest())
    return Record(path, captions, mask, use_alpha, content.hexdigest(), is_prior)
