"""A random CLIP model of some thousand numbers, in the layout of the hub."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.tiny_pipeline import tokenizer

PREPARATION = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def save_clip(folder: Path) -> Path:
    """The model, its tokenizer and the preparation of its images."""
    torch.manual_seed(4)
    words = tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small
        | {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": 16}
        | {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id},
        vision_config=small | {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).eval().save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder
