"""Models of the hub: which files are asked for, and what is said where there is none."""

from pathlib import Path

import pytest

from models import hub_models
from tests.refusals import sentence

FILES = [
    "README.md",
    "model_index.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "whole.safetensors",
]


def test_one_form_of_each_networks_weights_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return "/cache/somewhere"

    monkeypatch.setattr(hub_models, "snapshot_download", snapshot)
    monkeypatch.setattr(hub_models.HfApi, "list_repo_files", lambda self, model: FILES)
    assert hub_models.download_model("someone/model") == Path("/cache/somewhere")
    assert set(FILES) - set(asked) == {FILES[0], FILES[4], FILES[-1]}


def test_a_folder_is_its_own_and_a_name_that_the_hub_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline\nand more")

    monkeypatch.setattr(hub_models, "snapshot_download", refuse)
    monkeypatch.setattr(hub_models.HfApi, "list_repo_files", refuse)
    assert hub_models.download_configs(str(tmp_path)) == tmp_path
    for download in (hub_models.download_configs, hub_models.download_model):
        said = sentence(download, "someone/nothing")
        assert "someone/nothing is not a local" in said and said.endswith("offline")
    (tmp_path / "toy/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = sentence(hub_models.download_configs, "toy/modle")
    start = "there is no folder toy/modle, the nearest is toy/model; the hub gave no model"
    assert said == f"{start} of that name: offline"
