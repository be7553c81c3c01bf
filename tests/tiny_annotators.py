"""Random BLIP, Florence-2 and OWL-ViT models of some thousand numbers, in the layout of the hub."""

import json
from pathlib import Path

import torch
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    OwlViTConfig,
    OwlViTForObjectDetection,
)

from tests.tiny_pipeline import LETTERS, tokenizer

PREPARATION = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = SMALL | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def save_preparation(folder: Path) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def save_blip(folder: Path) -> Path:
    torch.manual_seed(5)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "a", "photo", "dog", "face"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    words = BertTokenizer(vocab=vocab)
    text = SMALL | {"num_hidden_layers": 2, "vocab_size": len(vocab), "bos_token_id": 2}
    text |= {"eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 16}
    config = BlipConfig(
        text_config=text | {"max_position_embeddings": 64, "projection_dim": 16},
        vision_config=VISION,
        projection_dim=16,
        image_text_hidden_size=16,
    )
    network = BlipForConditionalGeneration(config).eval()
    with torch.no_grad():
        network.text_decoder.cls.predictions.bias.copy_(torch.linspace(-2, 2, len(vocab)))
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    return save_preparation(folder)


def save_florence(folder: Path) -> Path:
    torch.manual_seed(6)
    names = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *LETTERS, *LETTERS.upper(), "Ġ", "."]
    words = BartTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[])
    config = Florence2Config(
        text_config={"model_type": "bart", "d_model": 16, "vocab_size": len(names)}
        | {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 256}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "bos_token_id": 0, "eos_token_id": 2}
        | {"pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        vision_config={"depths": [1, 1], "embed_dim": [8, 16], "num_heads": [2, 2]}
        | {"num_groups": [2, 2], "patch_size": [7, 3], "patch_stride": [4, 2]}
        | {"patch_padding": [3, 1], "patch_prenorm": [False, True], "projection_dim": 16}
        | {"window_size": 4},
        image_token_id=names.index("<image>"),
    )
    network = Florence2ForConditionalGeneration(config).eval()
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    return save_preparation(folder)


def save_owlvit(folder: Path, *, bias: float = 0.0) -> Path:
    """`bias` is added to the scores: at -100 nothing is found."""
    torch.manual_seed(7)
    words = tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = OwlViTConfig(
        text_config=SMALL
        | {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": 16}
        | ends,
        vision_config=VISION,
        projection_dim=16,
    )
    network = OwlViTForObjectDetection(config).eval()
    with torch.no_grad():
        network.class_head.logit_shift.bias.add_(bias)
    network.save_pretrained(folder)
    words.save_pretrained(folder)
    return save_preparation(folder)
