"""Families: found by the name of a pipeline, imported when needed; other models are refused."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.errors import UserError
from models import FAMILIES, load_family
from tests.tiny_pipeline import save_sd_pipeline


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_sd_pipeline(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(
        index.read_text().replace("StableDiffusionPipeline", "StableDiffusion3Pipeline")
    )
    with pytest.raises(
        UserError, match=r"StableDiffusion3Pipeline.*supported are StableDiffusionPipeline"
    ):
        load_family(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_family("model.safetensors")
    with pytest.raises(UserError, match="--model"):
        load_family("")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20)
    index.write_text(
        index.read_text().replace("StableDiffusion3Pipeline", "StableDiffusionPipeline")
    )
    with pytest.raises(UserError, match="unet"):
        load_family(str(tmp_path))


def test_every_pipeline_of_a_family_is_found_by_its_name() -> None:
    by_file: dict[str, list[str]] = {}
    for name, file in FAMILIES.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        assert tuple(names) == importlib.import_module(file).PIPELINES


def test_a_family_is_imported_when_a_model_of_it_is_opened() -> None:
    code = "import sys, models; print([name for name in sys.modules if name.startswith(PREFIXES)])"
    prefixes = ("diffusers", "transformers", "models.sd", "models.flux", "models.single_file")
    code = f"PREFIXES = {prefixes}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
