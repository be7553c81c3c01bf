"""A random StableDiffusion3Pipeline of a few thousand numbers, with real tokenizer classes whose
vocabularies are letters.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny_flux import t5_tokenizer
from tests.tiny_pipeline import tokenizer

BLOCKS = 3
VARIANTS = {  # entries of the transformer's config
    "medium": {},
    "5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "5-large": {"qk_norm": "rms_norm"},
}


def clip(width, act="quick_gelu"):
    """(text encoder, tokenizer) of CLIP with a projection."""
    tokens = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=width, hidden_act=act,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config), tokens


def pipeline(seed=0, *, variant="5-medium", missing=(), dynamic=False):
    """VAE of factor 2, latents of 4 channels, so images are multiples of 4 pixels."""
    torch.manual_seed(seed)
    clip_l, tokens_l = clip(16)
    clip_g, tokens_g = clip(24, "gelu")
    t5_tokens = t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(t5_tokens) + 9,
        d_model=48,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=BLOCKS, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32,
        pooled_projection_dim=40, pos_embed_max_size=12, **VARIANTS[variant],
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        scaling_factor=1.5, shift_factor=0.06,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    parts = {
        "text_encoder": clip_l, "tokenizer": tokens_l,
        "text_encoder_2": clip_g, "tokenizer_2": tokens_g,
        "text_encoder_3": T5EncoderModel(t5), "tokenizer_3": t5_tokens,
    }  # fmt: skip
    for name in missing:
        parts[name] = None
        parts[name.replace("text_encoder", "tokenizer")] = None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **parts)
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
    for norm in transformer.modules():
        if type(norm).__name__ == "RMSNorm":
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # ones would hide a missing norm
    return pipe


def save(folder, **how):
    """The pipeline, saved in the diffusers layout."""
    pipe = pipeline(**how)
    pipe.save_pretrained(Path(folder))
    return pipe
