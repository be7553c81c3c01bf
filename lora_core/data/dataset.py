"""Training images: Record -> Example -> Batch.

Every random choice is keyed by (seed, key, visit, purpose), so an example is the same for any batch
size, worker count or resume point. Caches are keyed by an example's content.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from PIL import Image

from lora_core.data.batches import Batch, Example, collate, micro_batches
from lora_core.data.buckets import Size, cut_size, kept_size
from lora_core.data.caption_tags import compose_caption
from lora_core.data.images import (
    READER_VERSION,
    MaskedImage,
    RecentImages,
    crop_image,
    harden_mask,
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
    every_image,
    find_unused_files,
    images_missing_word,
    list_again,
    scan_folder,
)
from lora_core.data.sample_order import sample_position
from lora_core.data.step_visits import StepOrder, Visit
from lora_core.diffusion.noise import keyed_generator
from lora_core.errors import UserError
from lora_core.settings import ImageSettings

__all__ = [
    "Batch", "Example", "ImageDataset", "ImageSettings", "Record", "collate",
    "describe_moved_crops", "describe_unread_folder_names", "describe_upscaled", "every_image",
    "find_unused_files", "images_missing_word", "iterate_batches", "list_again", "micro_batches",
    "sample_position", "scan_folder",
]  # fmt: skip

K = TypeVar("K")
T = TypeVar("T")

JITTER = 0.1  # brightness and contrast within +-10 %, as cloneofsimo's color_jitter


class ImageDataset:
    """Images with captions and masks, as examples.

    `sizes` are the (h, w) that the records are cropped to, the loser of a pair like its winner.
    Decoded images stay in memory up to
    `keep_bytes`. A visit has the empty caption with probability `caption_dropout` (for
    classifier-free guidance, arXiv 2207.12598); prior records keep theirs. Tags and wildcards of a
    record are drawn at each visit, unless `plain_captions` (`Record.plain_caption`). Raises
    UserError for no records and a probability outside [0, 1).

    If some records have a mask, the others get masks of ones, so that a loss does not depend on the
    other images in the batch. No visit has a mask of zeros, which would train nothing (kohya takes
    such a step with the loss 0): a crop without any of the mask is moved to one of the mask's
    pixels, at random where crops are random. With `hard_masks` greys become black or white
    (`harden_mask`), as an inpainting model needs them. Raises UserError for masks that vanish when
    they are scaled, and for masks that have one value in every crop.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: ImageSettings,
        *,
        seed: int = 0,
        caption_dropout: float = 0.0,
        hard_masks: bool = False,
        keep_bytes: int = 2**29,
        plain_captions: bool = False,
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
        self.sizes = [cut_size(settings, r.size, r.path) for r in self.records]
        self.hard_masks = hard_masks
        self.plain_captions = plain_captions
        self.has_masks = any(r.has_mask for r in self.records)
        self.has_pairs = self.records[0].loser is not None
        if any((record.loser is not None) != self.has_pairs for record in self.records):
            raise ValueError("some records are pairs and others are single images")
        self._recent = RecentImages(keep_bytes)
        self._copies: Counter[str] = Counter()  # key -> how many records have this content
        self._copy: list[int] = []  # per record, how many before it have the same content
        for record in self.records:
            self._copy.append(self._copies[record.key])
            self._copies[record.key] += 1
        self.off_center = self._check_masks()  # images whose mask is outside the center crop

    def __len__(self) -> int:
        return len(self.records)

    def visit(self, index: int, times: int) -> int:
        """The visit number of record `index`, counted over all records of the same content.

        `times` counts the record's own earlier visits (without buckets: one per epoch). Copies
        (repeats, identical files) take turns, so each gets its own noise.
        """
        return times * self._copies[self.records[index].key] + self._copy[index]

    def example(
        self, index: int, visit: int, size: Size | None = None, *, is_loser: bool = False
    ) -> Example:
        """One visit to a record, or to the loser of a pair, cut to `size` (h, w) or to the record's
        own size.

        Pixels depend on (settings, size, key, visit), or visit mod variants; the caption always on
        the visit itself. What is drawn for a pair holds for both images: where they have different
        sizes, a crop's place is the same share of what each has to spare.
        """
        record, s = self.records[index], self.settings
        file = record
        if is_loser:
            assert record.loser is not None
            file = record.loser
        size = size or self.sizes[index]
        variant = visit % s.variants if s.variants else visit

        def draw(purpose: str) -> float:
            return self._uniform(record, variant, purpose)

        image = self._read(file, size)
        if s.zoom > 1:
            scale = 1 + (s.zoom - 1) * draw("zoom")
            target = (round(size[0] * scale), round(size[1] * scale))
            image = resize_image(image, target, s.interpolation)
        if self.hard_masks:
            image = harden_mask(image)
        if s.flip and draw("flip") < 0.5:
            image = mirror_image(image)
        corner = _crop_corner(image, size, draw if s.crop == "random" else None)
        image = crop_image(image, corner, size)
        if s.jitter:
            brightness = 1 + JITTER * (2 * draw("brightness") - 1)
            contrast = 1 + JITTER * (2 * draw("contrast") - 1)
            image = jitter_colors(image, brightness, contrast)
        pixels = image_to_pixels(image.image)
        mask = None
        if image.mask is not None:
            mask = image_to_tensor(image.mask).div(255)
        elif self.has_masks:
            mask = torch.ones_like(pixels[:1])
        caption, dropped = self._choose_caption(record, visit)
        return Example(
            pixels=pixels,
            mask=mask,
            caption=caption,
            original_size=image.original_size,
            crop=corner,
            key=record.key,
            visit=visit,
            is_prior=record.is_prior,
            dropped=dropped,
            is_loser=is_loser,
        )

    def cache_key(self, record: Record, visit: int, size: Size | None = None) -> str:
        """The cache key of tensors computed from this visit's pixels, cropped to `size`.

        None is the record's own size. The key depends on the content and every setting that
        changes pixels, not on captions. Raises UserError when pixels are new at every visit,
        because then nothing would be read twice.
        """
        s = self.settings
        settings: dict[str, object] = {
            "size": tuple(size or cut_size(s, record.size)),
            "interpolation": s.interpolation,
            "reading": READER_VERSION,
        }
        if s.buckets and not s.bucket_upscale:
            own = size or cut_size(s, record.size)
            settings["scaled"] = self._scaled_size(record, own)
        if self.hard_masks:  # a crop without any of the mask moves to it
            settings["masks"] = "hard"
        if s.is_random:
            if not s.variants:
                raise UserError(
                    "random crop, zoom, flip or jitter at every visit leaves nothing to cache; "
                    "set variants, or turn the cache off"
                )
            settings |= {"crop": s.crop, "zoom": s.zoom, "flip": s.flip, "jitter": s.jitter}
            settings |= {"seed": self.seed, "variant": visit % s.variants}
        content = json.dumps([record.key, settings], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def caption(self, index: int, visit: int) -> str:
        """The caption of a visit to a record; empty where it is dropped."""
        return self._choose_caption(self.records[index], visit)[0]

    def drops_caption(self, index: int, visit: int) -> bool:
        """Whether a visit to a record has no caption."""
        return self._choose_caption(self.records[index], visit)[1]

    def _choose_caption(self, record: Record, visit: int) -> tuple[str, bool]:
        """(caption of this visit, whether it was dropped)."""
        can_drop = self.caption_dropout > 0 and not record.is_prior
        if can_drop and self._uniform(record, visit, "caption dropout") < self.caption_dropout:
            return "", True
        count = len(record.captions)
        line = int(self._uniform(record, visit, "caption") * count) if count > 1 else 0
        generator = None
        if record.tags.varies and not self.plain_captions:
            generator = keyed_generator(self.seed, record.key, visit, "caption tags")
        return compose_caption(record.captions[line], record.tags, generator), False

    def _uniform(self, record: Record, visit: int, purpose: str) -> float:
        generator = keyed_generator(self.seed, record.key, visit, purpose)
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    def _check_masks(self) -> list[str]:
        """Names of the images whose mask is entirely outside the center crop.

        Raises UserError for a mask that vanishes when it is scaled, and where every mask has one
        value in every crop.
        """
        pairs = zip(self.records, self.sizes, strict=True)
        masked = {record.path: (record, size) for record, size in pairs if record.has_mask}
        outside = []
        is_center = self.settings.crop == "center"
        has_effect = not is_center or self.settings.zoom > 1
        for path, (record, size) in masked.items():
            image = resize_image(self._read(record, size), self._scaled_size(record, size))
            mask = harden_mask(image).mask if self.hard_masks else image.mask
            assert mask is not None
            if not mask.getbbox():
                cut = " and cut to black and white at half" if self.hard_masks else ""
                raise UserError(
                    f"nothing is left of the mask of {path} when it is scaled to {size[1]} x "
                    f"{size[0]} pixels{cut}; paint a larger one or raise --data.resolution"
                )
            if is_center:
                mask = _crop_mask(mask, _center_corner(mask, size), size)
                if not mask.getbbox():
                    outside.append(path.name)
            has_effect = has_effect or not mask.getbbox() or len(set(mask.getextrema())) == 2
        if masked and not has_effect:
            first = next(iter(masked)).name
            raise UserError(
                f"every mask is one grey inside the crop, without effect, first that of {first}; "
                "leave --data.masks out or paint others"
            )
        return outside

    def _read(self, record: Record, size: Size) -> MaskedImage:
        """The decoded file, resized already unless a zoom needs the original."""
        resized = None if self.settings.zoom > 1 else self._scaled_size(record, size)

        def read() -> MaskedImage:
            image = read_image(record.file, record.mask_file, use_alpha=record.use_alpha)
            if resized is None:
                return image
            return resize_image(image, resized, self.settings.interpolation)

        return self._recent.get((record.key, resized), read)

    def _scaled_size(self, record: Record, size: Size) -> Size:
        """The (h, w) that an image is scaled to cover before `size` is cut out of it: that size, or
        its own where images are not enlarged and have the place.
        """
        s = self.settings
        if not s.buckets or s.bucket_upscale:
            return size
        kept = kept_size(s, record.size)
        return kept if kept[0] >= size[0] and kept[1] >= size[1] else size


def _crop_corner(
    image: MaskedImage, size: Size, draw: Callable[[str], float] | None
) -> tuple[int, int]:
    """The corner (top, left) of a crop: random with `draw`, else the center's.

    A crop without any of the mask moves to the mask.
    """
    corner = _center_corner(image.image, size)
    if draw is not None:
        rows, columns = image.image.height - size[0], image.image.width - size[1]
        top = int(draw("crop top") * (rows + 1))
        left = int(draw("crop left") * (columns + 1))
        corner = (top, left)
    if image.mask is not None and not _crop_mask(image.mask, corner, size).getbbox():
        return _corner_on_mask(image.mask, size, draw)
    return corner


def _center_corner(image: Image.Image, size: Size) -> tuple[int, int]:
    """The corner (top, left) of a crop in the middle of the image."""
    return round((image.height - size[0]) / 2), round((image.width - size[1]) / 2)


def _crop_mask(mask: Image.Image, corner: tuple[int, int], size: Size) -> Image.Image:
    (top, left), (height, width) = corner, size
    return mask.crop((left, top, left + width, top + height))


def _corner_on_mask(
    mask: Image.Image, size: Size, draw: Callable[[str], float] | None
) -> tuple[int, int]:
    """The corner (top, left) of a crop that shows some of the mask.

    With `draw` it is a random crop that contains a random pixel of the mask, so crops with more of
    the mask are more likely. Without, the crop is centered on the mask's pixel nearest to the
    middle of the image, as far as the image allows.
    """
    pixels = image_to_tensor(mask)[0].nonzero()  # [n, 2] rows and columns
    if draw is None:
        middle = torch.tensor([mask.height - 1, mask.width - 1])
        chosen = int((2 * pixels - middle).square().sum(1).argmin())
    else:
        chosen = int(draw("mask pixel") * len(pixels))
    sides = (mask.height, mask.width)
    corner = []
    for axis, position, length, side in zip(
        ("top", "left"), pixels[chosen].tolist(), size, sides, strict=True
    ):
        first = max(0, position - length + 1)
        last = min(position, side - length)
        if draw is None:
            corner.append(min(max(position - length // 2, first), last))
        else:
            corner.append(first + int(draw(f"mask {axis}") * (last - first + 1)))
    return corner[0], corner[1]


def describe_moved_crops(folder: ImageDataset) -> str:
    """One sentence that counts the images whose mask is outside the center crop, or ""."""
    if not folder.off_center:
        return ""
    images = len({record.path for record in folder.records})
    count = f"{len(folder.off_center)} of {images} images, first {folder.off_center[0]}"
    other = "" if folder.settings.buckets else " (--data.buckets cuts off less)"
    return (
        f"the center crop shows nothing of the mask of {count}; "
        f"they are cropped around their masks instead{other}"
    )


def describe_upscaled(folder: ImageDataset) -> str:
    """One sentence that counts the images smaller than the size they are cropped to, or "".

    The zoom is ignored.
    """
    small = {}
    for record, size in zip(folder.records, folder.sizes, strict=True):
        for image in every_image([record]):
            if image.size[0] < size[0] or image.size[1] < size[1]:
                small[image.path] = image.size
    if not small:
        return ""
    path, (h, w) = next(iter(small.items()))
    images = len({record.path for record in every_image(folder.records)})
    target = "their bucket" if folder.settings.buckets else f"{folder.settings.resolution} pixels"
    verb = "is smaller than" if len(small) == 1 else "are smaller than"
    return (
        f"{len(small)} of {images} images {verb} {target} and scaled up, "
        f"first {path.name} ({w} x {h})"
    )


def iterate_batches(
    folder: ImageDataset,
    prior: ImageDataset | None = None,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    share: slice = slice(None),
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1, or a `share` of their instances and prior examples.

    A batch is `batch` instances of one size, then as many prior examples, cut to that size. A pair
    is one instance, and two examples next to each other: its winner and its loser. Without
    buckets step k holds samples k * batch .. (k + 1) * batch - 1 of an endless stream of
    permutations, with buckets those of `BucketOrder`. A step is a function of its number, so
    threads ahead of the loop (`workers`; 0 makes each batch when the loop takes it) change no bit.
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
    if prior is not None and folder.has_pairs:
        raise ValueError("pairs of images have no prior images beside them")
    order = StepOrder(folder, prior, batch=batch, seed=seed, share=share)

    def make_batch(step: int) -> Batch:
        return collate([make_example(folder, prior, visit) for visit in order.visits(step)])

    return make_ahead(make_batch, range(start, stop), workers)


def make_example(folder: ImageDataset, prior: ImageDataset | None, visit: Visit) -> Example:
    """The example of a visit to one of the images, or of the class images."""
    images = prior if visit.is_prior and prior is not None else folder
    return images.example(visit.record, visit.visit, visit.size, is_loser=visit.is_loser)


def make_ahead(make: Callable[[K], T], keys: Iterable[K], workers: int) -> Iterator[T]:
    """make(key) in order, up to 2 * workers of them under way in threads; 0: each when it is taken.

    Pillow decodes and resizes outside the interpreter lock.
    """
    if workers == 0:
        yield from map(make, keys)
        return
    pending: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    try:
        for key in keys:
            pending.append(pool.submit(make, key))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
