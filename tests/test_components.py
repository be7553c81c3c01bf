"""The components of a model folder: a part that is missing is named."""

from pathlib import Path

import pytest

from lora_core.errors import UserError
from models import load_family
from tests.tiny_pipeline import save_sd_pipeline


@pytest.mark.parametrize(
    "missing", ["vae", "unet", "text_encoder", "tokenizer", "scheduler", "model_index.json"]
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    save_sd_pipeline(tmp_path)
    path = tmp_path / missing
    path.unlink() if path.is_file() else path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=missing):
        load_family(str(tmp_path))
