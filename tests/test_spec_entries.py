"""Entries modelspec.* of a run, against what kohya's sd-scripts write of the same training."""

from pathlib import Path

import pytest

import train
from lora_core.config import Config, Stage, ValidationConfig
from tests import tiny_flux, tiny_sdxl
from tests.manager_readers import raw_header
from tests.test_configs import put
from tests.tiny_sd2 import second_pipeline

# sai_model_spec.build_metadata of sd-scripts 48d368fa, for resolution 16, timesteps 250 to 1000,
# clip_skip 2 (not for Flux, which has none), title "run", at 1,700,000,000 seconds; its date has no
# time zone. implementation_version, which it sets to its own commit, is not ours.
SHARED = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.title": "run",
    "modelspec.resolution": "16x16",
    "modelspec.date": "2023-11-14T22:13:20Z",
    "modelspec.timestep_range": "250,1000",
}
EXPECTED = {
    "sd1": {
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
    },
    "sd2": {
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v",
        "modelspec.encoder_layer": "2",
    },
    "sdxl": {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
    },
    "flux": {
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
    },
}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_model_spec_is_that_of_sd_scripts(
    family: str, config: Config, plain: None, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if family == "sdxl":
        tiny_sdxl.save(folder)
    elif family == "flux":
        tiny_flux.save(folder)
    elif family == "sd2":
        second_pipeline(width=1024, layers=2).save_pretrained(folder)
    values = {
        "model": config.model if family == "sd1" else str(folder),
        "stages": (Stage(1, groups=("denoiser",)),),
        "noise.low": 0.25,
        "clip_skip": 0 if family == "flux" else 1,
        "validation": ValidationConfig(every=-1),
    }
    run = train.train(put(config, values))
    header = raw_header(run / "run.safetensors")
    assert header["ss_base_model_version"] == VERSIONS[family]
    assert header["ss_v2"] == str(family == "sd2")
    found = {key: text for key, text in header.items() if key.startswith("modelspec.")}
    assert found.pop("modelspec.thumbnail").startswith("data:image/jpeg;base64,")
    assert found.pop("modelspec.hash_sha256") == "0x" + header["sshs_model_hash"]
    assert found.pop("modelspec.trigger_phrase") == "TOK"  # kohya: none, unless it is an option
    assert found == SHARED | EXPECTED[family]
    if family == "flux":
        assert header["ss_timestep_sampling"] == "sigma" and header["ss_discrete_flow_shift"]


def test_words_of_the_author_are_there(config: Config, quick: None) -> None:
    words = {
        "title": "My cat",
        "author": "me",
        "description": "A cat.\nIn *two* lines.",
        "license": "CC-BY-4.0",
        "tags": "cat, pet",
        "trigger": "zib",
    }
    values = {f"files.{name}": text for name, text in words.items()}
    run = train.train(put(config, values | {"stages": (Stage(1, groups=("denoiser", "tokens")),)}))
    for name in ("run.safetensors", "run_emb.safetensors"):
        header = raw_header(run / name)
        for key, text in words.items():
            entry = {"trigger": "trigger_phrase"}.get(key, key)
            assert header[f"modelspec.{entry}"] == text, (name, key)
