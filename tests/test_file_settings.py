"""Options of [files]: those that can do nothing are refused."""

from typing import Any

import pytest

from lora_core.config import Config, DataConfig, Stage
from lora_core.errors import UserError
from lora_core.file_settings import FileSettings
from tests.test_configs import put
from training.checks import config_checks

TOKENS = (Stage(1, groups=("tokens",)),)
NO_FILE = "a stage that trains denoiser or text_encoder, with adapters that LoRA files hold"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"files.public": True}, "--files.public has no effect without --push-to-hub"),
        ({"files.precision": "fp16", "stages": TOKENS}, f"--files.precision .* {NO_FILE}"),
        ({"files.sidecars": True, "stages": TOKENS}, f"--files.sidecars .* {NO_FILE}"),
        ({"files.thumbnail": 9, "adapter.kind": "full"}, f"--files.thumbnail .* {NO_FILE}"),
        ({"files.thumbnail": -1}, "--files.thumbnail is -1; expected at least 0"),
    ],
)
def test_what_cannot_act_is_refused(values: dict[str, Any], message: str) -> None:
    config = put(Config(model="m", data=DataConfig(images="x")), values)
    with pytest.raises(UserError, match=message):
        config_checks.check_config(config)


def test_defaults_keep_what_users_expect() -> None:
    """fp32 as sd-scripts without --save_precision; nothing public."""
    found = FileSettings()
    assert (found.precision, found.header, found.public) == ("fp32", "full", False)
