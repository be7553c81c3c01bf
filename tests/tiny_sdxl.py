"""Random Stable Diffusion XL pipelines of some ten thousand numbers in the diffusers layout, and
the true architecture without weights.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny_pipeline import LETTERS

SCALED = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    timestep_spacing="leading",
)  # SDXL's own
SCHEDULERS = {
    "euler": lambda: EulerDiscreteScheduler(**SCALED),
    "ddim": lambda: DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False),
    "dpm": lambda: DPMSolverMultistepScheduler(**SCALED),
    "edm": lambda: EDMDPMSolverMultistepScheduler(),  # Playground v2.5
    "edm_euler": lambda: EDMEulerScheduler(),
}
PLAYGROUND = dict(
    latents_mean=[-1.66, 1.89, -1.38, 2.52],
    latents_std=[8.49, 5.90, 6.55, 5.23],
    scaling_factor=0.5,
)
WIDTHS, POOLED, SIZE_WIDTH = (
    (16, 24),
    12,
    8,
)  # of the two text encoders, of the pooled prompt, of each number in time_ids
FULL_UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
    transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
FULL_CLIP = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
FULL_BIGG = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is "!" (id 0), the letters, start and end; CLIP-L's pads
    with the end, bigG's with "!".
    """
    words = ["!", *LETTERS, *(x + "</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        model_max_length=16,
        pad_token=pad,
    )


def text_encoder(make: type, tokens: CLIPTokenizer, width: int, *, layers: int, legacy: bool):
    """`legacy` has eos_token_id 2, like SDXL's files: transformers pools at the largest id."""
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=2,
        projection_dim=POOLED, max_position_embeddings=16, initializer_range=0.2,
        bos_token_id=tokens.bos_token_id, eos_token_id=2 if legacy else tokens.eos_token_id,
    )  # fmt: skip
    return make(config).eval()


def unet(channels: int = 4, *, refiner: bool = False) -> UNet2DConditionModel:
    """Two blocks, the inner with attention one and two deep, as SDXL's are."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(16, 32),
        layers_per_block=2, norm_num_groups=4,
        transformer_layers_per_block=[1, 2], attention_head_dim=[2, 4], use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTHS[1] if refiner else sum(WIDTHS), addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=(5 if refiner else 6) * SIZE_WIDTH + POOLED,
    ).eval()  # fmt: skip


def vae(**settings) -> AutoencoderKL:
    """Factor 2; the same weights in every pipeline, as in a base model and its refiner."""
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        **({"scaling_factor": 0.13025} | settings),
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        **kinds,
    ).eval()


def pipeline(
    *,
    channels: int = 4,
    scheduler: str = "euler",
    refiner: bool = False,
    legacy: bool = False,
    seed: int = 1,
):
    """diffusers' pipeline: of the base model, of an inpainting one (9 channels), or of a refiner.
    EDM schedulers bring a VAE with means and stds.
    """
    parts = {
        "vae": vae(**(PLAYGROUND if scheduler.startswith("edm") else {})),
        "scheduler": SCHEDULERS[scheduler](),
    }
    torch.manual_seed(seed)
    first, second = tokenizer(), tokenizer(pad="!")
    encoders = (
        (CLIPTextModel, first, WIDTHS[0], 2),
        (CLIPTextModelWithProjection, second, WIDTHS[1], 3),
    )
    one, two = (
        text_encoder(make, tokens, width, layers=layers, legacy=legacy)
        for make, tokens, width, layers in encoders
    )
    parts |= (
        {"text_encoder": None, "tokenizer": None}
        if refiner
        else {"text_encoder": one, "tokenizer": first}
    )
    parts |= {"text_encoder_2": two, "tokenizer_2": second, "unet": unet(channels, refiner=refiner)}
    make = StableDiffusionXLPipeline if channels == 4 else StableDiffusionXLInpaintPipeline
    settings = {}
    if refiner:
        make, settings = (
            StableDiffusionXLImg2ImgPipeline,
            {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
        )
    pipe = make(**parts, **settings, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(
    folder: Path,
    *,
    channels: int = 4,
    scheduler: str = "euler",
    refiner: bool = False,
    legacy: bool = False,
    seed: int = 1,
):
    """The pipeline of these settings, after saving it to `folder`."""
    pipe = pipeline(
        channels=channels, scheduler=scheduler, refiner=refiner, legacy=legacy, seed=seed
    )
    pipe.save_pretrained(folder)
    return pipe


def full_size():
    """(UNet, CLIP-L, bigG) of SDXL 1.0 on the meta device."""
    with torch.device("meta"):
        text = (
            CLIPTextModel(CLIPTextConfig(**FULL_CLIP)),
            CLIPTextModelWithProjection(CLIPTextConfig(**FULL_BIGG)),
        )
        return UNet2DConditionModel(**FULL_UNET), *text
