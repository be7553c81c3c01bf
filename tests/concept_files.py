"""Concepts for the embedded model: random LoRAs of text encoder and denoiser, with tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.formats import embeddings
from lora_core.formats.layout import Layout
from models import read_layout

MODEL = "toy/model"


def random_concept(layout: Layout, word: str, seed: int, rank: int = 2) -> AdapterState:
    """A LoRA on attention and 1x1 projections, and two tokens of the usual names."""
    noise = torch.Generator().manual_seed(seed)
    components: dict[str, dict[str, LowRank]] = {}
    for component, part in layout.components.items():
        for path, (out, fan, *kernel) in part.shapes.items():
            if not any(name in path for name in ("attn", "proj_in", ".mlp.fc1")):
                continue
            down = torch.randn(rank, fan, *kernel, generator=noise) / fan**0.5
            up = 0.3 * torch.randn(out, rank, *[1] * len(kernel), generator=noise) / rank**0.5
            components.setdefault(component, {})[path] = LowRank(down, up, 1.0)
    names = ("<s0>", "<s1>")
    metadata = embeddings.placeholder_header({word: names})
    metadata[embeddings.TOKEN_NAMES] = '["<s0>", "<s1>"]'
    rows = {}
    for component, key in layout.encoders.items():
        width = layout.components[component].width
        rows[key] = 0.05 * torch.randn(2, width, generator=noise)
    return AdapterState(components, rows, names, metadata)  # type: ignore[arg-type]


def save_concepts(folder: Path, *words: str, model: str = MODEL) -> list[str]:
    """Run folders of random concepts, each with its word; their paths."""
    layout = read_layout(model)
    paths = []
    for seed, word in enumerate(words, 1):
        place = folder / f"concept{seed}"
        formats.save_run(random_concept(layout, word, seed), place, layout=layout)
        paths.append(str(place))
    return paths
