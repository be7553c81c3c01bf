"""The table of published layouts against the networks that it describes."""

import re

from lora_core import formats
from models import known, read_layout
from models.published import PUBLISHED_MODELS
from models.published_configs import published_configs
from tests import tiny_sdxl


def test_configs_are_those_of_the_published_models():
    """The numbers of modules that public trainers adapt, and other tests' full-size networks."""
    layouts = known.published_layouts()
    unet, clip, big = tiny_sdxl.full_size()
    expected = formats.layout_of(
        {"text_encoder": clip, "text_encoder_2": big, "unet": unet}
    ).components
    assert {name: part.shapes for name, part in layouts["sdxl"].components.items()} == {
        name: part.shapes for name, part in expected.items()
    }
    count = {
        kind: sum(
            bool(re.search(r"transformer_blocks|proj_in|proj_out", path))
            for path in found.components["unet"].shapes
        )
        for kind, found in layouts.items()
        if "unet" in found.components
    }
    assert count["sd1"] == count["sd2"] == 192 and count["sdxl"] == 722
    assert {kind: found.base_model_version for kind, found in layouts.items()} == {
        "sd1": "sd_v1",
        "sd1-inpainting": "sd_v1",
        "sd2": "sd_v2",
        "sd2-v": "sd_v2_v",
        "sd2-inpainting": "sd_v2",
        "sdxl": "sdxl_base_v1-0",
        "sdxl-inpainting": "sdxl_base_v1-0",
        "sdxl-refiner": "sdxl_refiner_v1-0",
        "flux-dev": "flux1",
        "flux-schnell": "flux1",
        "sd3": "medium",
        "sd3.5-medium": "5-medium",
        "sd3.5-large": "5-large",
        "sd3.5-large-turbo": "5-large",
        "flux2-klein-base-4b": "flux_2_klein_4b",
        "flux2-klein-4b": "flux_2_klein_4b",
        "flux2-klein-base-9b": "flux_2_klein_9b",
        "flux2-klein-9b": "flux_2_klein_9b",
        "flux2-dev": "flux_2_dev",
    }
    assert layouts["sd2"].components["text_encoder"].width == 1024
    for kind in PUBLISHED_MODELS:
        # the table against the networks; after a change run python -m models.published_tables
        assert read_layout(str(published_configs(kind))) == layouts[kind]
