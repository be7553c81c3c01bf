"""A random Stable Diffusion pipeline of a few thousand numbers, for tests that ask diffusers' own
loaders.
"""

import fnmatch
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_core.adapters.weight_updates import AdapterState, LowRank

LETTERS = "abcdefghijklmnopqrstuvwxyz"
UNET_TARGETS = (
    "*attn?.to_*",
    "*ff.net*",
    "*proj_in",
    "*proj_out",
    "*resnets*conv*",
    "*time_emb_proj",
    "*samplers*conv",
)
LONGEST = 16  # tokens of a prompt
CHUNK = LONGEST - 2  # of them without BOS and EOS
TEXT_TARGETS = ("*self_attn*proj", "*mlp.fc?")


def tokenizer():
    """A CLIP tokenizer whose vocabulary is the letters."""
    vocab = {
        token: i
        for i, token in enumerate(
            [*LETTERS, *(x + "</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
        )
    }
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LONGEST)


SMALL_UNET = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
# sixteen cross-attention layers, named as in Stable Diffusion 1 and 2
DEEP_UNET = dict(
    block_out_channels=(8,) * 4,
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)


def pipeline(seed=0, blocks=SMALL_UNET):
    torch.manual_seed(seed)
    tok = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4, **blocks
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    config = CLIPTextConfig(
        vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LONGEST,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae,
        CLIPTextModel(config),
        tok,
        unet,
        DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        module.eval()
    return pipe


def outputs(pipe, text="a cat"):
    """(UNet's output, text encoder's output) for one fixed input."""
    noise = torch.Generator().manual_seed(7)
    x, condition = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 5, 16, generator=noise)
    ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([3, 700]), condition).sample, pipe.text_encoder(
            ids
        ).last_hidden_state


def random_state(
    pipe,
    rank=3,
    scale=0.5,
    *,
    dora=False,
    mixed=False,
    size=0.3,
    unet=UNET_TARGETS,
    text=TEXT_TARGETS,
    seed=1,
):
    """Factors for every target of both networks under published names; `mixed` gives ranks 1, 2, 3
    ... and scales that differ by layer.
    """
    noise = torch.Generator().manual_seed(seed)
    components = {"unet": {}, "text_encoder": {}}
    for name, network, patterns, level in (
        ("unet", pipe.unet, unet, ""),
        ("text_encoder", pipe.text_encoder, text, "text_model."),
    ):
        for i, (path, module) in enumerate(network.named_modules()):
            if not isinstance(module, nn.Linear | nn.Conv2d) or not any(
                fnmatch.fnmatchcase(path, p) for p in patterns
            ):
                continue
            weight, r = module.weight.detach(), 1 + i % 3 if mixed else rank
            down = torch.randn(r, *weight.shape[1:], generator=noise) * size
            up = torch.randn(weight.shape[0], r, *[1] * (weight.ndim - 2), generator=noise) * size
            magnitude = (
                weight.flatten(1).norm(dim=1) * (0.5 + torch.rand(weight.shape[0], generator=noise))
                if dora
                else None
            )
            components[name][level + path] = LowRank(
                down, up, scale * (1 + i % 2) if mixed else scale, magnitude
            )
    return AdapterState({name: modules for name, modules in components.items() if modules})


SCALED = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
)


def save_sd_pipeline(
    folder: Path, *, prediction: str = "epsilon", channels: int = 4, blocks=SMALL_UNET
) -> StableDiffusionPipeline:
    """A pipeline with factor-4 VAE and `channels` input channels, saved in the diffusers layout."""
    pipe = pipeline(blocks=blocks)
    torch.manual_seed(1)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | {
        "in_channels": channels
    }
    pipe.unet = UNet2DConditionModel.from_config(config).eval()
    pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(**SCALED, prediction_type=prediction)
    make = StableDiffusionPipeline if channels == 4 else StableDiffusionInpaintPipeline
    pipe = make(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe
