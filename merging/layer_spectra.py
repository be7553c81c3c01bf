"""The layers of an adapter with their singular values, for the tables of info and diff."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora_core.adapters.weight_updates import AdapterState, DenseUpdate, LowRank
from lora_core.errors import UserError
from lora_core.progress import track
from merging.adapter_sums import LayerKey, layers_by_key
from merging.factor_sums import one_thread
from merging.svd import singular_values

TINY = 1e-300  # keeps logarithms and quotients of zero energies finite


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer of an adapter."""

    key: LayerKey
    adapter: LowRank | DenseUpdate
    sigma: Tensor  # [k] singular values of all groups in fp64, descending

    @property
    def rank(self) -> int:
        return len(self.sigma) if isinstance(self.adapter, DenseUpdate) else self.adapter.rank

    @property
    def alpha(self) -> float:
        scale = 1.0 if isinstance(self.adapter, DenseUpdate) else self.adapter.scale
        return self.rank * scale

    @property
    def is_conv(self) -> bool:
        if isinstance(self.adapter, DenseUpdate):
            return len(self.adapter.shape) == 4
        return self.adapter.down.ndim == 4

    @property
    def factors(self) -> LowRank:
        """The factors without the magnitude of a DoRA."""
        assert isinstance(self.adapter, LowRank)
        return self.adapter._replace(magnitude=None)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return float(self.sigma.square().sum().sqrt())

    @property
    def effective_rank(self) -> float:
        """e to the entropy of the energies (Roy and Vetterli 2007)."""
        share = self.sigma.square() / self.sigma.square().sum().clamp_min(TINY)
        return float(torch.exp(-(share * share.clamp_min(TINY).log()).sum()))

    def ranks_of_energy(self, *shares: float) -> list[int]:
        """The rank that holds each share of the energy; 0 for an update that is zero."""
        energy = self.sigma.square().cumsum(0) / self.sigma.square().sum().clamp_min(TINY)
        if not self.norm:
            return [0] * len(shares)
        return [int((energy < share - 1e-12).sum()) + 1 for share in shares]


def layer_spectra(state: AdapterState, path: str) -> Iterator[LayerSpectrum]:
    """The spectrum of every layer. `path` is for the progress bar and error messages."""
    layers = layers_by_key(state).items()
    with one_thread():
        for key, lr in track(layers, Path(path).name, "layer", len(layers)):
            try:
                sigma = _spectrum(lr)
            except ValueError as error:
                raise UserError(f"{'.'.join(key)} of {path}: {error}") from None
            yield LayerSpectrum(key, lr, sigma.flatten().sort(descending=True).values)


def _spectrum(update: LowRank | DenseUpdate) -> Tensor:
    if isinstance(update, DenseUpdate):
        return torch.linalg.svdvals(update.build().flatten(1).double())
    return singular_values(update._replace(magnitude=None))
