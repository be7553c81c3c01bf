"""A tiny model of sixteen cross-attention layers, and files of words with tokens for each layer."""

from pathlib import Path

import torch

from lora_core import formats
from lora_core.adapters.live_modules import live_layout
from lora_core.adapters.weight_updates import AdapterState
from lora_core.formats.embeddings import placeholder_header
from lora_core.formats.layout import Layout
from tests.tiny_pipeline import DEEP_UNET, pipeline, random_state, save_sd_pipeline

LAYERS = 16
KNOWN_LAYERS = ("*attn?.to_*", "*ff.net*", "*.proj_in", "*.proj_out")  # of Mix-of-Show's loader
WORDS = {"<dog>": (2, LAYERS), "TOK": (1, LAYERS), "cat": (1, 0)}


def layered_state(pipe, words=WORDS, *, seed=0, **how) -> AdapterState:
    """Factors of ranks 1 to 3, and words given as word -> (tokens in a layer, layers or 0)."""
    state = random_state(pipe, mixed=True, seed=seed, **{"unet": KNOWN_LAYERS, **how})
    tokens: dict[str, list[str]] = {}
    names: list[str] = []
    for word, (count, layers) in words.items():
        more = count * max(layers, 1)
        tokens[word] = [f"<s{len(names) + i}>" for i in range(more)]
        names += tokens[word]
    noise = torch.Generator().manual_seed(seed)
    state.tokens = {"clip_l": torch.randn(len(names), 16, generator=noise) * 0.3}
    state.token_names = tuple(names)
    layers_of = {word: layers for word, (_, layers) in words.items()}
    state.metadata = placeholder_header(tokens, layers_of)
    return state


def deep_pipeline():
    return pipeline(blocks=DEEP_UNET)


def deep_layout(pipe) -> Layout:
    return live_layout({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


def save_deep_folder(folder: Path) -> Path:
    """model/, the run folder run/, and two ED-LoRA files with the same words."""
    pipe = save_sd_pipeline(folder / "model", blocks=DEEP_UNET)
    layout = deep_layout(pipe)
    (folder / "run").mkdir()
    formats.save_run(layered_state(pipe), folder / "run", layout=layout)
    words = {"<dog1>": (1, LAYERS), "<dog2>": (1, LAYERS)}
    for seed, name in enumerate("ab", 1):
        targets = {"unet": ("*attn?.to_*", "*ff.net.0.proj"), "text": ("*self_attn*proj",)}
        state = layered_state(pipe, words, seed=seed, **targets)
        formats.save(state, folder / f"{name}.pth", format="mixofshow", layout=layout)
    return folder
