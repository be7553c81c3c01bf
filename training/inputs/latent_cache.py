"""Latents of a run's images: from a cache where pixels repeat, else by the VAE in each step."""

from __future__ import annotations

import functools
import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_core.config import Config
from lora_core.data.cache import TensorCache
from lora_core.data.dataset import Batch, Example, Record, every_image, make_ahead, make_example
from lora_core.data.records import loser_key
from lora_core.data.step_visits import Visit
from lora_core.diffusion import generation
from lora_core.diffusion.noise import RandomKeys
from lora_core.errors import UserError
from lora_core.memory.residency import to_device
from lora_core.progress import track
from training.setup import Data, Model

# image (Batch.image_keys), visit up to repetition, (h, w)
PixelKey = tuple[str, int, tuple[int, ...]]


class LatentCache:
    """Mean and std of the latents of images whose pixels repeat, and the inputs of an inpainting
    model for images with a hole of their own.
    """

    def __init__(self, config: Config, data: Data, model: Model) -> None:
        self.config, self.data, self.model = config, data, model
        self.records: dict[str, Record] = {}
        for folder in filter(None, (data.training, data.class_images)):
            self.records |= {record.key: record for record in every_image(folder.records)}
        self.visits_until_repeat = pixels_repeat_after(data)
        cache = config.data.cache
        made_by = vae_fingerprint(model.family.modules["vae"]) if cache else {}
        self.posteriors = TensorCache(made_by, cache or None)  # row of a PixelKey: mean and std
        # row of a PixelKey with a mask of its own as the hole: an inpainting model's input
        self.holes = TensorCache({**made_by, "hole": "mask"}, cache or None)

    @property
    def rows(self) -> Mapping[PixelKey, Mapping[str, Tensor]]:
        """Mean and std of the latents that are in memory."""
        return self.posteriors.rows  # type: ignore[return-value]

    # ------------------------------------------------------------ in a step

    @torch.no_grad()
    def posterior(self, batch: Batch, *, check: bool) -> tuple[Tensor, Tensor]:
        """Mean and std [b, c, h, w] of the latents; from the cache for pixels that repeat."""
        device = self.model.device
        if not self.visits_until_repeat:
            check = check or self.config.vae_precision == "fp16"
            return self._encode_images(batch.pixels, batch.image_keys, check=check)
        known, size = self.posteriors.rows, tuple(batch.pixels.shape[-2:])
        means, stds = [], []
        for i, (image, visit) in enumerate(zip(batch.image_keys, batch.visits, strict=True)):
            key = image, visit % self.visits_until_repeat, size
            if key in known:
                known.move_to_end(key)  # read last
                row: Mapping[str, Tensor] = known[key]
            else:
                row = self._posterior_row(key, visit, batch.pixels[i : i + 1])
            means.append(row["mean"])
            stds.append(row["std"])
        return to_device(torch.stack(means), device), to_device(torch.stack(stds), device)

    @torch.no_grad()
    def inpainting_input(self, batch: Batch, keys: RandomKeys) -> Tensor:
        """[b, 1 + c, h, w] inpainting masks and the masked latents.

        The masks are random rectangles or, with --data.mask-use hole or both, those of the images;
        class images and other images without a mask get random ones then, too.
        """
        given = [self._has_own_hole(key) for key in batch.keys]
        holes = generation.random_hole_masks(keys, *batch.pixels.shape[-2:])
        if batch.mask is not None:
            holes = torch.where(torch.tensor(given).view(-1, 1, 1, 1), batch.mask, holes)
        if not self.visits_until_repeat or not any(given):
            return self._encode_hole(batch.pixels, holes)
        parts = []
        for i, key in enumerate(self._pixel_keys(batch)):
            pixels, hole = batch.pixels[i : i + 1], holes[i : i + 1]
            if not given[i]:
                parts.append(self._encode_hole(pixels, hole))
                continue
            row = self._hole_row(key, batch.visits[i], pixels, hole)
            parts.append(to_device(row["input"], self.model.device)[None])
        return torch.cat(parts)

    # ------------------------------------------------------------ before a stage

    @torch.no_grad()
    def encode_ahead(self, visits: Iterable[Visit]) -> int:
        """Encode the images of these visits whose pixels repeat and whose row is neither in memory
        nor on disk; returns how many there were.

        With a folder they come in an order of this process's own, so that processes that share it
        seldom encode the same image.
        """
        missing = [v for v in self._distinct(visits) if not self._has_rows(v)]
        if self.config.data.cache:
            random.Random(os.getpid()).shuffle(missing)
        examples = make_ahead(self._read_missing, missing, self.config.data.workers)
        done = 0
        visited = zip(missing, examples)
        for visit, example in track(visited, "encoding images", "image", len(missing)):
            if example is None or self._has_rows(visit):  # another process was faster
                continue
            row = self._encode_example(self._key(visit), visit.visit, example)
            done += 1
            if done == 1:
                self.posteriors.check_room(row, len(missing), "images")
        return done

    def steps_encode(self, visits: Sequence[Visit]) -> bool:
        """Whether steps need the VAE: for pixels that never repeat, or for random holes."""
        if not self.visits_until_repeat:
            return True
        if not self.model.family.inpainting:
            return False
        return not all(self._has_own_hole(self._key(visit)[0]) for visit in visits)

    def _distinct(self, visits: Iterable[Visit]) -> list[Visit]:
        """One visit for each PixelKey."""
        if not self.visits_until_repeat:
            return []
        found: dict[PixelKey, Visit] = {}
        for visit in visits:
            found.setdefault(self._key(visit), visit)
        return list(found.values())

    def _key(self, visit: Visit) -> PixelKey:
        images = self.data.class_images if visit.is_prior else self.data.training
        assert images is not None
        key = images.records[visit.record].key
        image = loser_key(key) if visit.is_loser else key
        return image, visit.visit % max(self.visits_until_repeat, 1), visit.size

    def _read_missing(self, visit: Visit) -> Example | None:
        """The example of a visit; None where its rows have been made since."""
        if self._has_rows(visit):
            return None
        return make_example(self.data.training, self.data.class_images, visit)

    def _has_rows(self, visit: Visit) -> bool:
        key = self._key(visit)
        name = self._disk_key(key, visit.visit)
        if not self.posteriors.has_row(key, disk_key=name):
            return False
        return not self._caches_hole(key) or self.holes.has_row(key, disk_key=name)

    def _encode_example(self, key: PixelKey, visit: int, example: Example) -> Mapping[str, Tensor]:
        """Put the rows of an example into the cache; returns its mean and std."""
        pixels = example.pixels[None]
        row = self._posterior_row(key, visit, pixels)
        if self._caches_hole(key):
            assert example.mask is not None
            self._hole_row(key, visit, pixels, example.mask[None])
        return row

    def _caches_hole(self, key: PixelKey) -> bool:
        return self.model.family.inpainting and self._has_own_hole(key[0])

    # ------------------------------------------------------------ rows

    def _pixel_keys(self, batch: Batch) -> list[PixelKey]:
        size = tuple(batch.pixels.shape[-2:])
        pairs = zip(batch.image_keys, batch.visits, strict=True)
        return [(image, visit % self.visits_until_repeat, size) for image, visit in pairs]

    def _disk_key(self, key: PixelKey, visit: int) -> str:
        height, width = key[2]
        return self.data.training.cache_key(self.records[key[0]], visit, (height, width))

    def _posterior_row(self, key: PixelKey, visit: int, pixels: Tensor) -> Mapping[str, Tensor]:
        """Mean and std [c, h, w] of an image [1, 3, h, w], from the cache or by the VAE."""
        family = self.model.family
        height, width = key[2]
        shape = (family.latent_channels, height // family.factor, width // family.factor)

        def encode() -> dict[str, Tensor]:
            mean, std = self._encode_images(pixels, (key[0],), check=True)
            return {"mean": mean[0], "std": std[0]}

        shapes = {"mean": shape, "std": shape}
        return self.posteriors.row(key, encode, shapes, disk_key=self._disk_key(key, visit))

    def _hole_row(
        self, key: PixelKey, visit: int, pixels: Tensor, hole: Tensor
    ) -> Mapping[str, Tensor]:
        """The input [1 + c, h, w] of an image with its own hole."""
        family = self.model.family
        height, width = key[2]
        shape = (1 + family.latent_channels, height // family.factor, width // family.factor)
        encode = functools.partial(self._encode_hole, pixels, hole)
        return self.holes.row(
            key,
            lambda: {"input": encode()[0]},
            {"input": shape},
            disk_key=self._disk_key(key, visit),
        )

    def _has_own_hole(self, image: str) -> bool:
        return self.config.data.mask_use != "loss" and self.records[image].has_mask

    def _encode_images(
        self, pixels: Tensor, images: Sequence[str], *, check: bool
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of the latents by the VAE. Raises UserError for NaN and infinity."""
        mean, std = self.model.family.encode_images(pixels)
        if not check:
            return mean, std
        finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1).tolist()
        if all(finite):
            return mean, std
        precision = self.config.vae_precision
        if precision == "fp16":
            raise UserError(
                "the VAE overflows in fp16 on these images; leave --vae-precision at fp32, "
                "or give a VAE made for fp16 with --vae"
            )
        path = self.records[images[finite.index(False)]].path
        raise UserError(
            f"the VAE gives NaN or infinity for {path} in {precision}: its weights are damaged; "
            "give another --vae"
        )

    def _encode_hole(self, pixels: Tensor, hole: Tensor) -> Tensor:
        """[b, 1 + c, h, w] the masks on the grid of the latents, and the latents around them."""
        family, device = self.model.family, self.model.device
        pixels, hole = to_device(pixels, device), to_device(hole, device)
        return generation.encode_masked_image(family, pixels, hole)


def pixels_repeat_after(data: Data) -> int:
    """Visits after which an image has the same pixels again; 0: never."""
    settings = data.training.settings
    return settings.variants if settings.is_random else 1


def vae_fingerprint(vae: nn.Module) -> Mapping[str, str]:
    """Settings of a latent cache on the disk: a hash of the encoding weights, so that a
    retrained VAE at the same path does not get old latents.
    """
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in vae.state_dict().items():
        flat = tensor.cpu().reshape(-1)  # a batch norm's counter has no axis
        numbers = flat.view(torch.uint8).numpy().tobytes()
        content.update(name.encode() + str(tensor.dtype).encode() + numbers)
    return {"vae": content.hexdigest()}
