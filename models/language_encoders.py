"""Language models as text encoders: a prompt in a conversation, hidden states of some layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.family import LoadOptions
from models.components import open_tokenizer, read_json, tokenize_texts

Chat = list[dict[str, Any]]


class LanguageEncoder(NamedTuple):
    """A language model that reads prompts, and how it reads them."""

    network: Any  # its class in transformers, without the head that predicts tokens
    model_type: str  # in its config.json
    tokenizer: Any  # its tokenizer's class
    layers: tuple[int, ...]  # counted from 0; their inputs are the prompt embeddings
    chat: Callable[[str], Chat]  # the conversation with a prompt
    template: Mapping[str, bool]  # arguments of the tokenizer's chat template


def refuse_clip_options(path: str, how: LoadOptions) -> None:
    """Raises UserError for options of CLIP, which a model with a language model has not."""
    for option, value in (("clip-skip", how.clip_skip), ("max-token-length", how.max_token_length)):
        if value:
            raise UserError(
                f"--{option} has no effect: the text encoder of {path} is no CLIP; leave it out"
            )


def check_language_encoder(path: str, reader: LanguageEncoder) -> int:
    """The width of the prompt embeddings that the model's text encoder gives.

    Raises UserError, from its config.json alone, for another language model or too few layers.
    """
    config = read_json(path, "text_encoder/config.json")
    if config.get("model_type") != reader.model_type:
        raise UserError(
            f"the text encoder of {path} is of type {config.get('model_type')}, expected "
            f"{reader.model_type}; take all parts from one model"
        )
    text = config.get("text_config", config)
    layers, last = text.get("num_hidden_layers", 0), reader.layers[-1]
    if layers <= last:
        raise UserError(
            f"the text encoder of {path} has {layers} layers, and the input of layer {last}, "
            "counted from 0, is a prompt embedding; take all parts from one model"
        )
    return len(reader.layers) * int(text.get("hidden_size", 0))


def open_chat_tokenizer(path: str, reader: LanguageEncoder, device: torch.device | str) -> Any:
    """The tokenizer of a language model. Raises UserError for one without a chat template."""
    tokenizer = open_tokenizer(reader.tokenizer, path, "tokenizer", device)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {path} has no chat template, which makes a conversation of a "
            "prompt; fetch tokenizer/ again"
        )
    return tokenizer


def keep_read_layers(network: Any, reader: LanguageEncoder) -> Any:
    """The language model without what prompts do not need: layers after the last that is read, and
    the part that reads images.
    """
    language: Any = getattr(network, "language_model", network)
    del language.layers[reader.layers[-1] + 1 :]
    return language


def tokenize_chats(
    tokenizer: Any, reader: LanguageEncoder, prompts: Sequence[str], length: int, checked: set[str]
) -> dict[str, Tensor]:
    """Token ids [b, length] of the conversations with the prompts, and the mask of their padding.

    `checked` as in `tokenize_prompts`.
    """
    texts = []
    for prompt in prompts:
        chat = reader.chat(prompt)
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, **reader.template))
    # as transformers' processors ask, whose templates begin a text with this token themselves
    start = getattr(tokenizer, "bos_token", None)
    begins = bool(start) and all(text.startswith(start) for text in texts)
    out = tokenize_texts(tokenizer, texts, length, checked, adds_special=not begins)
    return {"input_ids": out.input_ids, "attention_mask": out.attention_mask}


def read_hidden_states(
    network: Any, reader: LanguageEncoder, tokens: Mapping[str, Tensor]
) -> Tensor:
    """Prompt embeddings [b, length, layers d]: the inputs of the layers side by side."""
    out = network(**tokens, output_hidden_states=True, use_cache=False)
    return torch.cat([out.hidden_states[layer] for layer in reader.layers], dim=-1)
