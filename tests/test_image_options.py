"""infer.py's options: their order in the help, their ranges, and those shared with training."""

from dataclasses import fields

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.image_options import ImageRequest, Infer
from lora_core.model_settings import ModelConfig
from lora_core.settings import SamplerSettings, check_options


def test_the_help_begins_with_what_is_asked_for() -> None:
    names = [option.name for option in fields(Infer)]
    first = [option.name for option in fields(ImageRequest)]
    assert names[: len(first)] == first and first[:2] == ["lora", "prompt"]


def test_the_model_and_the_sampler_have_the_options_of_training() -> None:
    """One class each, so that a name, a help text and a range are the same in both programs."""
    own = {option.name for option in fields(Infer)}
    assert {option.name for option in fields(ModelConfig)} <= own
    assert {option.name for option in fields(SamplerSettings)} <= own
    assert issubclass(Config, ModelConfig)
    assert isinstance(Config().samples, SamplerSettings.__mro__[1])


def test_numbers_out_of_range_are_refused() -> None:
    for wrong, text in ((Infer(count=0), "--count is 0"), (Infer(batch=0), "--batch is 0")):
        with pytest.raises(UserError, match=text):
            check_options(wrong, "--")
