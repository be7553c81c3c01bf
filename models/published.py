"""The published models whose files and configs are known here: their names and hub ids."""

from __future__ import annotations

from typing import NamedTuple


class PublishedModel(NamedTuple):
    """One published model; its configs are those of its name in `models.published_configs`."""

    title: str  # for messages
    like: str = ""  # the model with the same adapters, where it is a variant


# Where a variant and its original both fit a file, the original is meant.
PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "sd1": PublishedModel("Stable Diffusion 1.x"),
    "sd1-inpainting": PublishedModel("Stable Diffusion 1.x inpainting", like="sd1"),
    "sd2": PublishedModel("Stable Diffusion 2.x"),
    "sd2-v": PublishedModel("Stable Diffusion 2.x 768-v", like="sd2"),
    "sd2-inpainting": PublishedModel("Stable Diffusion 2.x inpainting", like="sd2"),
    "sdxl": PublishedModel("Stable Diffusion XL"),
    "sdxl-inpainting": PublishedModel("Stable Diffusion XL inpainting", like="sdxl"),
    "sdxl-refiner": PublishedModel("Stable Diffusion XL's refiner", like="sdxl"),
    "flux-dev": PublishedModel("Flux.1 dev"),
    "flux-schnell": PublishedModel("Flux.1 schnell", like="flux-dev"),
    "sd3": PublishedModel("Stable Diffusion 3 medium"),
    "sd3.5-medium": PublishedModel("Stable Diffusion 3.5 medium"),
    "sd3.5-large": PublishedModel("Stable Diffusion 3.5 large"),
    "sd3.5-large-turbo": PublishedModel("Stable Diffusion 3.5 large turbo", like="sd3.5-large"),
    "flux2-klein-base-4b": PublishedModel("FLUX.2 klein base 4B"),
    "flux2-klein-4b": PublishedModel("FLUX.2 klein 4B", like="flux2-klein-base-4b"),
    "flux2-klein-base-9b": PublishedModel("FLUX.2 klein base 9B"),
    "flux2-klein-9b": PublishedModel("FLUX.2 klein 9B", like="flux2-klein-base-9b"),
    "flux2-dev": PublishedModel("FLUX.2 dev"),
}
# Hub repositories of the models in the table, and of copies with the same configs.
HUB_NAMES = {
    "runwayml/stable-diffusion-v1-5": "sd1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "runwayml/stable-diffusion-inpainting": "sd1-inpainting",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "sd1-inpainting",
    "stabilityai/stable-diffusion-2-base": "sd2",
    "stabilityai/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-2": "sd2-v",
    "stabilityai/stable-diffusion-2-1": "sd2-v",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-inpainting",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "sdxl-inpainting",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "sdxl-refiner",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "black-forest-labs/FLUX.1-schnell": "flux-schnell",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd3.5-large-turbo",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2-klein-base-4b",
    "black-forest-labs/FLUX.2-klein-4B": "flux2-klein-4b",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2-klein-base-9b",
    "black-forest-labs/FLUX.2-klein-9B": "flux2-klein-9b",
    "black-forest-labs/FLUX.2-dev": "flux2-dev",
}
