"""A random AuraFlowPipeline of some thousand numbers, whose tokenizer knows letters."""

from pathlib import Path

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import LlamaTokenizerFast, UMT5Config, UMT5EncoderModel

from tests.tiny_pipeline import LETTERS


def pile_tokenizer() -> LlamaTokenizerFast:
    """A tokenizer of AuraFlow's class: padding is token 1, as there, and prompts end with EOS."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *"0123456789<>"]
    return LlamaTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        pad_token="<s>",
        add_bos_token=False,
        add_eos_token=True,
    )


def pipeline(seed: int = 0) -> AuraFlowPipeline:
    """VAE of factor 2, latents of 4 channels, so images are multiples of 4 pixels; shift 1.73."""
    torch.manual_seed(seed)
    tokens = pile_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokens) + 9,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=32, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        scaling_factor=0.36,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = AuraFlowPipeline(tokens, UMT5EncoderModel(text), vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.transformer, pipe.text_encoder, pipe.vae):
        module.eval()
    for name, weight in pipe.transformer.named_parameters():
        if "norm" in name or "attn" in name:
            weight.data *= 15  # the gates are near zero, and the text would change no pixel
    return pipe


def save(folder: Path) -> AuraFlowPipeline:
    """The pipeline, saved in the diffusers layout."""
    pipe = pipeline()
    pipe.save_pretrained(folder)
    return pipe
