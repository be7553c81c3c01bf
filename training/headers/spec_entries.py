"""Header entries modelspec.* of a run's files: what a manager of LoRA files shows."""

from __future__ import annotations

from collections.abc import Sequence

from lora_core.config import Config
from lora_core.data.captions import TYPED
from lora_core.data.records import Record
from lora_core.formats.model_spec import PREFIX
from lora_core.formats.training_metadata import PRIVATE
from lora_core.run_clock import iso_date
from training.headers import trigger_words
from training.setup import Data, Model

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # the specification's words
TIMESTEPS = 1000  # that its ranges count
OWN_WORDS = ("title", "author", "description", "license", "tags")  # options of [files]


def spec_entries(config: Config, data: Data, model: Model, name: str) -> dict[str, str]:
    """The entries of the files called `name` that the formats do not write themselves."""
    side = config.data.resolution
    entries = {"resolution": f"{side}x{side}"}
    prediction = PREDICTIONS.get(model.family.prediction, "")
    if prediction and model.family.schedule.kind != "flow":  # flow models have no such choice
        entries["prediction_type"] = prediction
    low, high = _noise_range(config)
    if (low, high) != (0.0, 1.0):
        entries["timestep_range"] = f"{round(low * TIMESTEPS)},{round(high * TIMESTEPS)}"
    if config.clip_skip:
        entries["encoder_layer"] = str(config.clip_skip + 1)
    entries |= {word: getattr(config.files, word) for word in OWN_WORDS}
    records: Sequence[Record] = data.training.records
    trigger = trigger_words.find_trigger(config, records, model.placeholders, name)
    if config.files.header == "full" or not trigger.is_caption:
        entries["trigger_phrase"] = trigger.words
    entries["usage_hint"] = trigger_words.usage_hint(model.placeholders, name)
    spec = {f"{PREFIX}{key}": text for key, text in entries.items() if text}
    if config.files.header == "full" and _has_private_captions(config, records):
        spec[PRIVATE] = "tags, trigger" if trigger.is_caption else "tags"
    return spec


def _has_private_captions(config: Config, records: Sequence[Record]) -> bool:
    """Whether captions come from files of the training images and are not shown on demand."""
    are_typed = all(record.source in TYPED for record in records)
    return not are_typed and not config.samples.show_data


def date_entry(saved: float) -> dict[str, str]:
    """The date of a file, `saved` in seconds since 1970."""
    return {f"{PREFIX}date": iso_date(saved)}


def _noise_range(config: Config) -> tuple[float, float]:
    """The noise levels that some stage trains on, as fractions of the schedule."""
    lows, highs = [], []
    for stage in config.stages:
        lows.append(config.noise.low if stage.low is None else stage.low)
        highs.append(config.noise.high if stage.high is None else stage.high)
    return min(lows), max(highs)
