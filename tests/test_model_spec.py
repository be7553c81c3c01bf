"""The entries modelspec.* that a format writes, against those of kohya's sd-scripts."""

import pytest

from lora_core.formats.kohya import adapter_spec
from lora_core.formats.model_spec import embedding_spec
from models.known import published_layouts

CODE = "https://github.com/Stability-AI/generative-models"
FLUX = "https://github.com/black-forest-labs/flux"
# What determine_architecture and determine_implementation of sd-scripts (library/sai_model_spec.py,
# 48d368fa) give: architecture, implementation of a LoRA, that of an embedding.
SD_SCRIPTS = {
    "sd1": ("stable-diffusion-v1", "diffusers", CODE),
    "sd2": ("stable-diffusion-v2-512", "diffusers", CODE),
    "sd2-v": ("stable-diffusion-v2-768-v", "diffusers", CODE),
    "sdxl": ("stable-diffusion-xl-v1-base", CODE, CODE),
    "flux-dev": ("flux-1-dev", FLUX, FLUX),
    "flux-schnell": ("flux-1-schnell", FLUX, FLUX),
}


@pytest.mark.parametrize("kind", SD_SCRIPTS)
def test_architecture_and_implementation_are_those_of_sd_scripts(kind: str) -> None:
    layout = published_layouts()[kind]
    architecture, of_lora, of_embedding = SD_SCRIPTS[kind]
    must = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": "x"}
    assert adapter_spec(layout, "x") == must | {
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": of_lora,
    }
    assert embedding_spec(layout, "x") == must | {
        "modelspec.architecture": f"{architecture}/textual-inversion",
        "modelspec.implementation": of_embedding,
    }
