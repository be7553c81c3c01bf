"""The order of samples: which record is visited in which row of which step, each a pure function of
(seed, step).
"""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch

from lora_core.diffusion.noise import keyed_generator


def sample_position(n: int, index: int, seed: int, *, stream: str = "instance") -> tuple[int, int]:
    """(which of n records, epoch) of sample number `index` of the endless stream: every epoch is a
    permutation keyed by (seed, stream, epoch).
    """
    epoch, place = divmod(index, n)
    return epoch_permutation(n, epoch, seed, stream)[place], epoch


@lru_cache(maxsize=8)
def epoch_permutation(n: int, epoch: int, seed: int, stream: str) -> list[int]:
    """The numbers 0 .. n - 1 in an order of (seed, stream, epoch)."""
    return torch.randperm(n, generator=keyed_generator(seed, stream, epoch, "order")).tolist()


class BucketOrder:
    """Steps of `batch` records that share a group (the size they are cut to).

    In an epoch every record comes at least once: each group is shuffled, its last batch filled with
    further visits of its own records, and the batches of all groups are shuffled. The records that
    fill are taken in turn, round after round, so that none is favoured in the long run.
    """

    def __init__(self, groups: Sequence[Hashable], batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            self.members.setdefault(group, []).append(index)
        self.steps = sum(
            -(-len(members) // batch) for members in self.members.values()
        )  # in an epoch
        self._epoch = lru_cache(maxsize=4)(self._make)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`batch` pairs (record, how many times it was visited before)."""
        epoch, place = divmod(step, self.steps)
        return self._epoch(epoch)[place]

    def _make(self, epoch: int) -> list[list[tuple[int, int]]]:
        made = []
        for group, members in self.members.items():
            rows = [
                (members[place], count)
                for place, count in self._visits(len(members), epoch, f"bucket {group}")
            ]
            made += [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        return [made[i] for i in epoch_permutation(self.steps, epoch, self.seed, "batches")]

    def _visits(self, n: int, epoch: int, stream: str) -> list[tuple[int, int]]:
        """One epoch of a group of n: (place in the group, visits before), each place once in keyed
        order, then those that fill the last batch.
        """
        extra = -n % self.batch
        rounds, rest = divmod(epoch * extra, n)  # of filling, in the epochs before this one
        counts = [epoch + rounds] * n
        for place in epoch_permutation(n, rounds, self.seed, stream + " fill")[:rest]:
            counts[place] += 1
        fill = [
            sample_position(n, epoch * extra + i, self.seed, stream=stream + " fill")[0]
            for i in range(extra)
        ]
        visits = []
        for place in [*epoch_permutation(n, epoch, self.seed, stream), *fill]:
            visits.append((place, counts[place]))
            counts[place] += 1
        return visits
