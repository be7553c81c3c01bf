"""A random CLIPSeg model of some thousand numbers, in the layout of the hub."""

import json
from pathlib import Path

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from tests.tiny_pipeline import tokenizer

PREPARATION = {"size": 32, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_clipseg(folder: Path, *, contrast: float = 1.0) -> Path:
    """The model, its tokenizer and the preparation of its images.

    `contrast` multiplies the differences of the logits; at 0.01 words fit nothing.
    """
    torch.manual_seed(3)
    words = tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=small
        | {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": 16}
        | {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id},
        vision_config=small | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        projection_dim=8,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    network = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():
        network.decoder.transposed_convolution.weight.mul_(contrast)
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder
