"""The options of the base model are the same, with the same defaults, wherever there is a model."""

from dataclasses import fields

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.image_options import Infer
from lora_core.model_settings import ModelConfig
from lora_core.settings import check_options


def test_training_and_drawing_open_the_same_model_by_default() -> None:
    for option in fields(ModelConfig):
        assert getattr(Config(), option.name) == getattr(Infer(), option.name) == option.default


def test_a_wrong_choice_is_named_with_the_right_ones() -> None:
    with pytest.raises(UserError, match="--quantize is 'int3'; expected one of none, fp8"):
        check_options(ModelConfig(quantize="int3"), "--")  # type: ignore[arg-type]
