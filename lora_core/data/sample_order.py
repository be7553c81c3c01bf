"""The order of training samples: the records of each step, a pure function of (seed, step)."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch

from lora_core.diffusion.noise import keyed_generator


def sample_position(n: int, index: int, seed: int, *, stream: str = "instance") -> tuple[int, int]:
    """(which of n records, epoch) of sample number `index` of an endless stream.

    Every epoch is a permutation keyed by (seed, stream, epoch).
    """
    epoch, position = divmod(index, n)
    return epoch_permutation(n, epoch, seed, stream)[position], epoch


@lru_cache(maxsize=8)
def epoch_permutation(n: int, epoch: int, seed: int, stream: str) -> list[int]:
    """The numbers 0 .. n - 1 in an order keyed by (seed, stream, epoch)."""
    return torch.randperm(n, generator=keyed_generator(seed, stream, epoch, "order")).tolist()


class BucketOrder:
    """The order of batches in which all records belong to one group (size after cropping).

    In an epoch every record is used at least once: each group is shuffled, its last batch filled
    with further visits to its own records, and the batches of all groups are shuffled. The records
    that fill batches take turns, so that none is preferred in the long run.
    """

    def __init__(self, groups: Sequence[Hashable], batch: int, seed: int) -> None:
        self.batch = batch
        self.seed = seed
        self.members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            self.members.setdefault(group, []).append(index)
        sizes = [len(members) for members in self.members.values()]
        self.steps = sum(-(-size // batch) for size in sizes)  # in an epoch
        self._epoch = lru_cache(maxsize=4)(self._order_epoch)

    def visits(self, step: int) -> list[tuple[int, int]]:
        """`batch` pairs (record, how many times it was visited before)."""
        epoch, position = divmod(step, self.steps)
        return self._epoch(epoch)[position]

    def _order_epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        batches = []
        for group, members in self.members.items():
            visits = []
            for position, count in self._group_visits(len(members), epoch, f"bucket {group}"):
                visits.append((members[position], count))
            for start in range(0, len(visits), self.batch):
                batches.append(visits[start : start + self.batch])
        return [batches[i] for i in epoch_permutation(self.steps, epoch, self.seed, "batches")]

    def _group_visits(self, n: int, epoch: int, stream: str) -> list[tuple[int, int]]:
        """One epoch of a group of n as pairs (position in the group, visits before).

        Each position once in keyed order, then those that fill the last batch.
        """
        fill_stream = stream + " fill"
        extra = -n % self.batch
        # rounds of filling in the epochs before this one
        rounds, rest = divmod(epoch * extra, n)
        counts = [epoch + rounds] * n
        for position in epoch_permutation(n, rounds, self.seed, fill_stream)[:rest]:
            counts[position] += 1
        positions = list(epoch_permutation(n, epoch, self.seed, stream))
        for sample in range(epoch * extra, (epoch + 1) * extra):
            positions.append(sample_position(n, sample, self.seed, stream=fill_stream)[0])
        visits = []
        for position in positions:
            visits.append((position, counts[position]))
            counts[position] += 1
        return visits
