"""A random FluxPipeline of a few thousand numbers, with real tokenizer classes whose vocabularies
are letters.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from tests.tiny_pipeline import LETTERS, tokenizer


def t5_tokenizer():
    """A T5 tokenizer whose pieces are single characters and letters at the start of a word."""
    pieces = ["▁", *LETTERS, *("▁" + x for x in LETTERS), *"0123456789<>"]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    return T5TokenizerFast(
        vocab=special + [(piece, -2.0) for piece in pieces], extra_ids=0, model_max_length=32
    )


def pipeline(seed=0, *, guidance=True, dynamic=True):
    """guidance and dynamic: as dev; neither: as schnell. VAE of factor 2, latents of 4 channels, so
    images are multiples of 4 pixels.
    """
    torch.manual_seed(seed)
    clip_tokens, t5_tokens = tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=clip_tokens.bos_token_id, eos_token_id=clip_tokens.eos_token_id,
        initializer_range=0.2,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(t5_tokens) + 9,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        scaling_factor=0.36, shift_factor=0.12,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic
    )
    pipe = FluxPipeline(
        scheduler, vae, CLIPTextModel(clip), clip_tokens, T5EncoderModel(t5), t5_tokens, transformer
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        module.eval()
    for norm in (module for module in transformer.modules() if isinstance(module, nn.RMSNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # ones would hide a missing norm
    return pipe


def save(folder, *, guidance=True, dynamic=True):
    """The pipeline, saved in the diffusers layout."""
    pipe = pipeline(guidance=guidance, dynamic=dynamic)
    pipe.save_pretrained(Path(folder))
    return pipe
