"""Where the networks of each kind of model stand in a single file."""

from lora_core.formats.model_files import NetworkLocation

UNET, VAE = (
    NetworkLocation("unet", "model.diffusion_model.", "unet"),
    NetworkLocation("vae", "first_stage_model.", "vae"),
)
FIRST = (UNET, VAE, NetworkLocation("text_encoder", "cond_stage_model.transformer.", "clip"))
SECOND = (UNET, VAE, NetworkLocation("text_encoder", "cond_stage_model.model.", "open_clip"))
XL = (
    UNET, VAE, NetworkLocation("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
    NetworkLocation("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
)  # fmt: skip
REFINER = (
    UNET,
    VAE,
    NetworkLocation("text_encoder_2", "conditioner.embedders.0.model.", "open_clip"),
)
ROWS = {"first": FIRST, "second": SECOND, "xl": XL, "refiner": REFINER}


def tensors_of(single):
    return {key: single.read(key).clone() for key in single.infos}
