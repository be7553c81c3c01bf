"""Record -> Example -> Batch, with every random choice keyed by the example (seed, key, visit,
purpose).

So an example looks the same for any batch size, worker count or resume point, and whatever is
cached from it is keyed by its content.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lora_core.data.buckets import Size, cut_size
from lora_core.data.cache import TensorCache
from lora_core.data.captions import TEMPLATES
from lora_core.data.images import (
    READER_VERSION,
    MaskedImage,
    RecentImages,
    crop_image,
    image_to_pixels,
    image_to_tensor,
    jitter_colors,
    mirror_image,
    read_image,
    resize_image,
)
from lora_core.data.records import (
    Record,
    describe_unread_folder_names,
    find_unused_files,
    images_missing_word,
    scan_folder,
)
from lora_core.data.sample_order import BucketOrder, sample_position
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.settings import ImageSettings

__all__ = [
    "TEMPLATES", "Batch", "TensorCache", "Example", "ImageDataset", "ImageSettings", "Record", "iterate_batches", "collate", "images_missing_word", "sample_position",
    "describe_upscaled", "scan_folder", "describe_moved_crops", "describe_unread_folder_names", "find_unused_files",
]  # fmt: skip

JITTER = 0.1  # brightness and contrast within +-10 %, as cloneofsimo's color_jitter


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
    dropped: bool = False  # whether the caption is empty because it was dropped


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
    dropped: tuple[bool, ...]  # the rows whose caption was dropped

    def rows(self, index: slice) -> "Batch":
        """The batch with these rows only."""
        mask = None if self.mask is None else self.mask[index]
        return Batch(
            self.pixels[index], mask, self.captions[index], self.keys[index], self.visits[index],
            self.is_prior[index], self.original_sizes[index], self.crops[index], self.dropped[index],
        )  # fmt: skip


class ImageDataset:
    """Records that can be drawn as examples. Decoded images stay in memory up to `keep_bytes`.

    `sizes` are the (h, w) that the records are cut to. A visit has the empty caption with
    probability `caption_dropout` (for guidance without a classifier, arXiv 2207.12598); prior
    records keep theirs. Raises UserError for no records and a probability outside [0, 1).

    Where some records have a mask, the others have ones, so that a loss does not depend on what
    else is in the batch. No visit has a mask of zeros, which would train nothing (kohya takes such
    a step with the loss 0): a crop without any of the mask moves to one of the mask's pixels, at
    random where crops are random. Refused are masks that vanish when they are scaled, and masks
    that are one grey in every crop.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: ImageSettings,
        *,
        seed: int = 0,
        caption_dropout: float = 0.0,
        keep_bytes: int = 2**29,
    ) -> None:
        if not records:
            raise UserError("no images to draw from; scan a folder that has some")
        if not 0 <= caption_dropout < 1:
            raise UserError(
                f"expected a caption dropout of at least 0 and below 1, got {caption_dropout}"
            )
        self.records = list(records)
        self.settings = settings
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.sizes = [cut_size(settings, r.size) for r in self.records]
        self.has_masks = any(_has_mask(r) for r in self.records)
        self._recent = RecentImages(keep_bytes)
        self._copies: Counter[str] = Counter()  # of each content
        self._copy: list[int] = []  # which of them a record is
        for record in self.records:
            self._copy.append(self._copies[record.key])
            self._copies[record.key] += 1
        self.shifted = self._check_masks()  # images whose mask lies outside the centre crop

    def __len__(self) -> int:
        return len(self.records)

    def visit(self, index: int, times: int) -> int:
        """Which visit to its content record `index` makes after `times` visits of its own (without
        buckets: one an epoch).

        Copies (repeats, identical files) take turns, so each draws its own noise.
        """
        return times * self._copies[self.records[index].key] + self._copy[index]

    def example(self, index: int, visit: int, size: Size | None = None) -> Example:
        """One visit to a record, cut to `size` (h, w) instead of its own if that is given.

        Pixels depend on (settings, size, key, visit), or visit mod variants; the caption always on
        the visit itself.
        """
        record, s = self.records[index], self.settings
        height, width = size = size or self.sizes[index]

        def draw(purpose: str) -> float:
            return self._uniform(record, self._variant(visit), purpose)

        picture = self._picture(record, size)
        if s.zoom > 1:
            scale = 1 + (s.zoom - 1) * draw("zoom")
            picture = resize_image(
                picture, (round(height * scale), round(width * scale)), s.interpolation
            )
        if s.flip and draw("flip") < 0.5:
            picture = mirror_image(picture)
        free = (picture.image.height - height, picture.image.width - width)
        if s.crop == "random":
            top, left = (
                int(draw(f"crop {axis}") * (room + 1))
                for axis, room in zip(("top", "left"), free, strict=True)
            )
        else:
            top, left = _center_corner(free)
        if picture.mask is not None and not _crop(picture.mask, (top, left), size).getbbox():
            top, left = _corner_on_mask(picture.mask, size, draw if s.crop == "random" else None)
        picture = crop_image(picture, (top, left), size)
        if s.jitter:
            picture = jitter_colors(
                picture, *(1 + JITTER * (2 * draw(what) - 1) for what in ("brightness", "contrast"))
            )
        pixels = image_to_pixels(picture.image)
        mask = torch.ones_like(pixels[:1]) if self.has_masks else None
        if picture.mask is not None:
            mask = image_to_tensor(picture.mask).div(255)
        dropped = self._drops(record, visit)
        caption = "" if dropped else self._caption(record, visit)
        return Example(
            pixels,
            mask,
            caption,
            picture.original_size,
            (top, left),
            record.key,
            visit,
            record.is_prior,
            dropped,
        )

    def cache_key(self, record: Record, visit: int, size: Size | None = None) -> str:
        """A name for what is computed from the pixels of this visit, cut to `size` (None: the
        record's own).

        The content and every setting that changes pixels enter; captions do not. Raises UserError
        when pixels are fresh at every visit, for then nothing would be read twice.
        """
        s = self.settings
        settings: dict[str, object] = {
            "size": tuple(size or cut_size(s, record.size)),
            "interpolation": s.interpolation,
        }
        settings["reading"] = READER_VERSION
        if s.is_random and not s.variants:
            raise UserError(
                "random crop, zoom, flip or jitter at every visit leaves nothing to cache; "
                "set variants, or turn the cache off"
            )
        if s.is_random:
            random = ("crop", "zoom", "flip", "jitter")
            settings |= {name: getattr(s, name) for name in random}
            settings |= {"seed": self.seed, "variant": self._variant(visit)}
        return hashlib.blake2b(
            json.dumps([record.key, settings], sort_keys=True).encode(), digest_size=16
        ).hexdigest()

    def _drops(self, record: Record, visit: int) -> bool:
        """Whether this visit has no caption."""
        return (
            self.caption_dropout > 0
            and not record.is_prior
            and self._uniform(record, visit, "caption dropout") < self.caption_dropout
        )

    def _caption(self, record: Record, visit: int) -> str:
        return record.captions[int(self._uniform(record, visit, "caption") * len(record.captions))]

    def _variant(self, visit: int) -> int:
        return visit % self.settings.variants if self.settings.variants else visit

    def _uniform(self, record: Record, visit: int, purpose: str) -> float:
        return torch.rand(
            (),
            generator=keyed_generator(self.seed, record.key, visit, purpose),
            dtype=torch.float64,
        ).item()

    def _check_masks(self) -> list[str]:
        """Names of the images of which a centre crop shows nothing of the mask.

        Raises UserError for a mask that scaling leaves nothing of, and where every visit shows one
        grey of every mask.
        """
        pairs = zip(self.records, self.sizes, strict=True)
        masked = {record.path: (record, size) for record, size in pairs if _has_mask(record)}
        outside, is_center = [], self.settings.crop == "center"
        has_effect = not is_center or self.settings.zoom > 1
        for path, (record, size) in masked.items():
            mask = resize_image(self._picture(record, size), size).mask
            assert mask is not None
            if not mask.getbbox():
                raise UserError(
                    f"nothing is left of the mask of {path} when it is scaled to {size[1]} x "
                    f"{size[0]} pixels; "
                    "paint a larger one or raise --data.resolution"
                )
            if is_center:
                room = (mask.height - size[0], mask.width - size[1])
                mask = _crop(mask, _center_corner(room), size)
                outside += [] if mask.getbbox() else [path.name]
            has_effect = has_effect or not mask.getbbox() or len(set(mask.getextrema())) == 2
        if masked and not has_effect:
            first = next(iter(masked)).name
            raise UserError(
                f"every mask is one grey inside the crop, without effect, first that of {first}; "
                "leave --data.masks out or paint others"
            )
        return outside

    def _picture(self, record: Record, size: Size) -> MaskedImage:
        """The decoded file, already resized where no zoom asks for the original."""

        def read() -> MaskedImage:
            picture = read_image(record.path, record.mask_path, use_alpha=record.use_alpha)
            return (
                picture
                if self.settings.zoom > 1
                else resize_image(picture, size, self.settings.interpolation)
            )

        return self._recent.get((record.key, None if self.settings.zoom > 1 else size), read)


def _has_mask(record: Record) -> bool:
    return record.use_alpha or record.mask_path is not None


def _center_corner(room: tuple[int, int]) -> tuple[int, int]:
    """The corner (top, left) of a crop in the middle, where the image is larger by `room` (h, w)."""
    return round(room[0] / 2), round(room[1] / 2)


def _crop(mask: Image.Image, corner: tuple[int, int], size: Size) -> Image.Image:
    (top, left), (height, width) = corner, size
    return mask.crop((left, top, left + width, top + height))


def _corner_on_mask(
    mask: Image.Image, size: Size, draw: Callable[[str], float] | None
) -> tuple[int, int]:
    """The corner (top, left) of a crop that shows some of the mask.

    Drawn, it is one of those with a random pixel of the mask, so the more likely the more of the
    mask it shows. Without `draw` the pixel nearest to the image's middle comes to the middle of
    the crop, as far as the image reaches.
    """
    places = image_to_tensor(mask)[0].nonzero()  # [n, 2] rows and columns
    if draw is None:
        middle = torch.tensor([mask.height - 1, mask.width - 1])
        chosen = int((2 * places - middle).square().sum(1).argmin())
    else:
        chosen = int(draw("mask pixel") * len(places))
    corner = []
    sides = zip(
        ("top", "left"), places[chosen].tolist(), size, (mask.height, mask.width), strict=True
    )
    for axis, at, length, side in sides:
        first, last = max(0, at - length + 1), min(at, side - length)
        if draw is None:
            corner.append(min(max(at - length // 2, first), last))
        else:
            corner.append(first + int(draw(f"mask {axis}") * (last - first + 1)))
    return corner[0], corner[1]


def describe_moved_crops(folder: ImageDataset) -> str:
    """One sentence that counts the images whose mask lies outside the centre crop, or ""."""
    if not folder.shifted:
        return ""
    images = len({record.path for record in folder.records})
    count = f"{len(folder.shifted)} of {images} images, first {folder.shifted[0]}"
    other = "" if folder.settings.buckets else " (--data.buckets cuts off less)"
    return (
        f"the centre crop shows nothing of the mask of {count}; "
        f"they are cropped around their masks instead{other}"
    )


def describe_upscaled(folder: ImageDataset) -> str:
    """One sentence that counts the images that are smaller than the size they are cut to, zoom left
    aside; empty when there are none.
    """
    images = {r.path: (r.size, cut) for r, cut in zip(folder.records, folder.sizes, strict=True)}
    small = [(path, h, w) for path, ((h, w), cut) in images.items() if h < cut[0] or w < cut[1]]
    if not small:
        return ""
    path, h, w = small[0]
    what = "their bucket" if folder.settings.buckets else f"{folder.settings.resolution} pixels"
    verb = "is smaller than" if len(small) == 1 else "are smaller than"
    return (
        f"{len(small)} of {len(images)} images {verb} {what} and scaled up, first {path.name} ({w} "
        f"x {h})"
    )


def collate(examples: Sequence[Example]) -> Batch:
    """The examples as one batch; rows without a mask get ones when others have one."""
    mask = None
    if any(e.mask is not None for e in examples):
        mask = torch.stack(
            [torch.ones_like(e.pixels[:1]) if e.mask is None else e.mask for e in examples]
        )
    return Batch(
        torch.stack([e.pixels for e in examples]), mask, [e.caption for e in examples], tuple(e.key for e in examples),
        tuple(e.visit for e in examples), torch.tensor([e.is_prior for e in examples]),
        [e.original_size for e in examples], [e.crop for e in examples], tuple(e.dropped for e in examples),
    )  # fmt: skip


def iterate_batches(
    folder: ImageDataset,
    prior: ImageDataset | None = None,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1: `batch` instance rows of one size, then as many prior
    ones, cut to that size.

    Without buckets step k holds samples k * batch .. (k + 1) * batch - 1 of an endless stream of
    permutations, with buckets the rows of `Plan`. A step is a function of its number, so threads
    ahead of the loop (`workers`; 0 makes each batch when it is asked for) change no bit.
    """
    if batch < 1 or workers < 0 or start < 0:
        raise UserError(
            f"expected batch >= 1, workers >= 0 and start >= 0, got {batch}, {workers} and {start}"
        )
    if prior is not None and not all(r.is_prior for r in prior.records):
        raise ValueError(
            "the prior folder holds records that are not marked as prior; "
            "scan it with is_prior=True"
        )
    plan = BucketOrder(folder.sizes, batch, seed) if folder.settings.buckets else None

    def make(step: int) -> Batch:
        samples = range(step * batch, (step + 1) * batch)
        rows = plan.rows(step) if plan else [sample_position(len(folder), i, seed) for i in samples]
        size = folder.sizes[rows[0][0]]
        examples = [folder.example(record, folder.visit(record, times)) for record, times in rows]
        if prior is not None:
            rows = [sample_position(len(prior), i, seed, stream="prior") for i in samples]
            examples += [
                prior.example(record, prior.visit(record, times), size) for record, times in rows
            ]
        return collate(examples)

    return (
        map(make, range(start, stop)) if workers == 0 else _ahead(make, range(start, stop), workers)
    )


def micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in `parts` strides, so that each has its share of instance and of prior rows."""
    return (batch.rows(slice(i, None, parts)) for i in range(parts))


def _ahead(make: Callable[[int], Batch], steps: range, workers: int) -> Iterator[Batch]:
    """make(step) in order, up to 2 * workers of them under way in threads (Pillow decodes and
    resizes outside the interpreter lock).
    """
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
