"""A tiny pipeline shaped as Stable Diffusion 2."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny_pipeline


def second_pipeline(width=16, layers=23):
    """Shaped as Stable Diffusion 2: linear projections, v, a text tower of 23 layers. With its own
    width of 1024 it is taken for it.
    """
    torch.manual_seed(3)
    tok = tiny_pipeline.tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=[2, 4],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        use_linear_projection=True,
    )
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        **kinds,
    )
    config = CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        hidden_act="gelu",
        initializer_range=0.2,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae,
        CLIPTextModel(config),
        tok,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
