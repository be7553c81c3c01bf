"""The networks of the toy model with initial weights, and its folder in the diffusers layout.

Its parts are tokenizer, text encoder, autoencoder and denoiser.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toy.draw import CAPTION_TEMPLATES, COLORS, OBJECTS, PLACES, POSITIONS, SIZES, STYLES, TEXTURES

WORK = Path("/tmp/toy_work")
MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """Every word of the captions' grammar and a few more of users' prompts, sorted."""
    phrases = [
        *OBJECTS,
        *COLORS,
        *TEXTURES,
        *SIZES,
        *POSITIONS,
        *STYLES,
        *(p for p, _ in PLACES.values()),
        *CAPTION_TEMPLATES,
        "a an the at in on of with and background style tok photo one two three eye eyes scarf "
        "antennae alien character logo",
    ]
    text = " ".join(phrases).replace("{}", "")
    return sorted(set(text.split()))


def byte_symbols() -> list[str]:
    """The printable characters of the 256 bytes, in byte order (GPT-2's byte-level BPE)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges under which every word is one token.

    Each word is first merged by the rules so far, then joined from the left.
    """
    merges: list[tuple[str, str]] = []
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = [(ranks.get(p, len(merges)), i) for i, p in enumerate(pairwise(parts))]
            rank, i = min(pairs)
            if rank == len(merges):
                ranks[(parts[0], parts[1])] = rank
                merges.append((parts[0], parts[1]))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return merges


def write_tokenizer(folder: Path) -> None:
    """Writes the files of a CLIPTokenizer whose grammar words are single tokens.

    They are vocab.json, merges.txt and two configs. CLIP cuts "close-up" at its hyphen, the one
    exception.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges, symbols = learn_merges(grammar_words()), byte_symbols()
    entries = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *dict.fromkeys(a + b for a, b in merges),
        START,
        END,
    ]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / "vocab.json").write_text(
        json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)


def make_autoencoder() -> AutoencoderKL:
    """An autoencoder of 0.66 M parameters with 8 x 16 x 16 latents of a 64 x 64 image.

    The posterior starts narrow (log variance -5).
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[8:] = 0
        vae.quant_conv.bias[8:] = -5
    return vae


def make_denoiser() -> UNet2DConditionModel:
    """A denoiser of 2.3 M parameters; cross attention at 8 x 8 and in the middle only."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=128,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder of 0.4 M parameters, two layers 128 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=128,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scheduler: scaled linear, 1000 steps, epsilon prediction.

    Rombach et al., arXiv 2112.10752.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def write_pipeline(
    folder: Path,
    tokenizer: Path,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Writes the folder that StableDiffusionPipeline.from_pretrained reads, weights in fp16.

    It is written under a temporary name and renamed.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    parts: dict[str, nn.Module] = {"text_encoder": text, "vae": vae, "unet": unet}
    for name, part in parts.items():
        dtype = next(part.parameters()).dtype
        part.half().save_pretrained(partial / name)
        part.to(dtype)
    config = (
        partial / "text_encoder" / "config.json"
    )  # fp16 on disk is fp32 in memory, as diffusers has it; transformers 5 would follow the file
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    shutil.copytree(tokenizer, partial / "tokenizer")
    make_scheduler().save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
