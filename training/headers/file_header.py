"""The header of a run's files: its training under kohya's names, and Stability's model spec."""

from __future__ import annotations

from functools import cached_property

from lora_core.config import Config
from lora_core.formats.training_metadata import TRIGGER
from training.headers.dataset_entries import dataset_entries
from training.headers.kohya_entries import encode_entries, progress_entries, training_entries
from training.headers.spec_entries import date_entry, spec_entries
from training.setup import Data, Model, Optimization


class FileHeader:
    """Makes the header entries of the files of a run called `name`."""

    def __init__(
        self, config: Config, data: Data, model: Model, optimization: Optimization, name: str
    ) -> None:
        self.config, self.data, self.model = config, data, model
        self.optimization, self.name = optimization, name

    @cached_property
    def _training(self) -> dict[str, str]:
        """The entries ss_* that all files of the run share; hashes a model that is one file."""
        return encode_entries(
            training_entries(self.config, self.data, self.model, self.optimization, self.name)
        )

    def entries(self, done: int, stem: str, *, started: float, saved: float) -> dict[str, str]:
        """The entries of the files STEM.safetensors and STEM_emb.safetensors after `done` steps;
        times in seconds since 1970, of the run's start and of this step.
        """
        words = self.model.placeholders
        spec = spec_entries(self.config, self.data, self.model, stem) | date_entry(saved)
        if self.config.files.header == "short":
            return spec
        trigger = spec.get(TRIGGER, "")
        images = dataset_entries(self.config, self.data, words, stem, trigger)
        progress = progress_entries(self.config, self.data, done, started=started, saved=saved)
        return self._training | encode_entries(images | progress) | spec
