"""TIES, DARE and magnitude pruning: elementwise merges of dense updates.

They work on the products, not on the factors, whose entries are arbitrary: up M and M^-1 down give
the same update for any invertible M. Updates of one layer come weighted,
w_i * delta W_i, in fp32 or better and of one shape; the result is the merged dense update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (updates, density, generator) -> merged update
DenseMerge = Callable[[Sequence[Tensor], float, torch.Generator], Tensor]


def trim_to_density(update: Tensor, density: float) -> Tensor:
    """The update with all but its `density` share of largest magnitudes set to 0.

    All entries that equal the threshold are kept.
    """
    count = count_kept_entries(update.numel(), density)
    threshold = update.abs().flatten().kthvalue(update.numel() - count + 1).values
    return update * (update.abs() >= threshold)


def drop_and_rescale(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE's drop and rescale (arXiv 2311.03099, equation 3).

    Each entry is kept with probability `density` = 1 - p and is divided by it, else it is 0. The
    expectation over the generator is the update.
    """
    count_kept_entries(update.numel(), density)  # checks the density
    device = generator.device
    draws = torch.rand(update.shape, generator=generator, dtype=torch.float32, device=device)
    return update * (draws.to(update.device) < density) / density


def elect_and_average(updates: Sequence[Tensor]) -> Tensor:
    """The sign election and disjoint mean of TIES (arXiv 2306.01708, section 3, steps 2 and 3).

    The elected sign of an entry is that of the sum; the mean is over the updates with that sign.
    Where the sum is 0 so is the result. Weighted updates have weighted votes, as in mergekit
    (peft elects without weights).
    """
    stack = torch.stack(tuple(updates))
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def ties(updates: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Trim, elect, mean (arXiv 2306.01708). Draws nothing.

    A mean, not a sum: files that agree give their average.
    """
    return elect_and_average([trim_to_density(update, density) for update in updates])


def dare(updates: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """The sum of the updates after drop and rescale (arXiv 2311.03099)."""
    return torch.stack([drop_and_rescale(update, density, generator) for update in updates]).sum(0)


def dare_ties(updates: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """TIES with drop and rescale instead of trimming (arXiv 2311.03099, section 4.3)."""
    return elect_and_average([drop_and_rescale(update, density, generator) for update in updates])


def prune_by_magnitude(
    updates: Sequence[Tensor], density: float, generator: torch.Generator
) -> Tensor:
    """The sum of the updates after each is trimmed to its largest entries. Draws nothing."""
    return torch.stack([trim_to_density(update, density) for update in updates]).sum(0)


def count_kept_entries(entries: int, density: float) -> int:
    """The number of entries that a density keeps, at least 1.

    Raises ValueError for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"a density is above 0 and at most 1, got {density}")
    return max(1, int(density * entries))


MERGES: dict[str, DenseMerge] = {
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude": prune_by_magnitude,
}
