"""The examples of each training step, named before any image is read: a pure function of the step's
number, by which a run knows in advance what it has to encode.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lora_core.data.buckets import Size
from lora_core.data.sample_order import BucketOrder, sample_position
from lora_core.settings import ImageSettings


class Visit(NamedTuple):
    """One example of a step."""

    is_prior: bool  # of the class images
    record: int  # its number
    visit: int  # how often its content was used before
    size: Size  # that the image is cut to, (h, w)
    is_loser: bool = False  # the other image of a pair


class VisitedImages(Protocol):
    """What the order of steps reads of an ImageDataset."""

    settings: ImageSettings
    sizes: list[Size]
    has_pairs: bool

    def __len__(self) -> int: ...

    def visit(self, index: int, times: int) -> int: ...


class StepOrder:
    """The order of a run's examples. `step` holds `batch` instances of one size, then as many prior
    examples, cut to that size; a pair is one instance and two examples, winner and loser.

    Without buckets step k holds samples k * batch .. (k + 1) * batch - 1 of an endless stream of
    permutations, with buckets those of `BucketOrder`.
    """

    def __init__(
        self,
        images: VisitedImages,
        prior: VisitedImages | None,
        *,
        batch: int,
        seed: int,
        share: slice = slice(None),
    ) -> None:
        self.images, self.prior, self.batch, self.seed = images, prior, batch, seed
        self.share = share  # of a step's instances and prior examples: one process of several
        self.buckets: BucketOrder | None = None
        if images.settings.buckets:
            self.buckets = BucketOrder(images.sizes, batch, seed)

    def visits(self, step: int) -> list[Visit]:
        """The examples of a step, in their order in the batch."""
        images, samples = self.images, range(step * self.batch, (step + 1) * self.batch)
        found: list[Visit] = []
        instances = self._instances(step, samples)
        for record, times in instances[self.share]:
            visit = images.visit(record, times)
            found.append(Visit(False, record, visit, images.sizes[record]))
            if images.has_pairs:
                found.append(Visit(False, record, visit, images.sizes[record], is_loser=True))
        if self.prior is not None:
            size = images.sizes[instances[0][0]]
            for i in samples[self.share]:
                record, times = sample_position(len(self.prior), i, self.seed, stream="prior")
                found.append(Visit(True, record, self.prior.visit(record, times), size))
        return found

    def _instances(self, step: int, samples: Sequence[int]) -> list[tuple[int, int]]:
        """(record, how many times it was visited before) of each instance."""
        if self.buckets is not None:
            return self.buckets.visits(step)
        return [sample_position(len(self.images), i, self.seed) for i in samples]
