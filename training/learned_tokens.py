"""Learned tokens of a run: placeholders, rows in the text encoders, targets of their norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import tokens
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.family import Family
from lora_core.placeholders import Placeholder, make_placeholders
from training.checks import model_checks

CLIP_ENCODERS = ("clip_l", "clip_g")  # learn tokens where the config names no text encoder
MOST_WORDS = 5  # that are nearest to a token in some layer
STOP_NORM = 0.55  # mean norm at which Mix-of-Show's emb_norm_threshold stops SD 1.5's rows


def install_run_tokens(
    config: Config, family: Family, encoders: Mapping[str, nn.Module]
) -> tuple[tuple[Placeholder, ...], dict[str, tokens.LearnedEmbedding]]:
    """The placeholders, and the learned token rows of each text encoder that learns them; both
    empty without a stage that trains tokens. Raises UserError if no text encoder would learn them.
    """
    if not config.trains("tokens"):
        return (), {}
    keys = family.layout.encoders
    wanted = config.tokens.encoders or CLIP_ENCODERS
    chosen = [name for name in encoders if keys[name] in wanted]
    if missing := set(config.tokens.encoders) - {keys[name] for name in chosen}:
        raise UserError(
            f"--tokens.encoders has {', '.join(sorted(missing))}; "
            f"the text encoders of this model are {', '.join(keys.values())}"
        )
    if not chosen:
        advice = "train no tokens in a stage"
        if keys:
            advice = f"name others with --tokens.encoders ({', '.join(keys.values())})"
        raise UserError(f"this model has no CLIP text encoder to learn tokens; {advice}")
    initializers = model_checks.token_initializers(config)
    tokenizers = [family.tokenizers[name] for name in chosen]
    vectors = [
        config.tokens.vectors or tokens.count_initializer_tokens(initializer, tokenizers)
        for initializer in initializers.values()
    ]
    layers = 0
    if config.tokens.per_layer:
        layers = _count_text_layers(family)
    placeholders = make_placeholders(
        initializers, vectors, layers=layers, names=config.tokens.names
    )
    embeddings = {}
    for name in chosen:
        stream = "" if name == "text_encoder" else keys[name]
        embeddings[name] = tokens.install_tokens(
            encoders[name], family.tokenizers[name], placeholders, seed=config.seed, stream=stream
        )
    return placeholders, embeddings


def norm_targets(
    config: Config, embeddings: Mapping[str, tokens.LearnedEmbedding]
) -> dict[str, Tensor]:
    """Text encoder -> [n, 1] target norms of its rows, for `pull` and `stop` of --tokens.norm.

    Raises UserError for rows that `stop` would never let train.
    """
    wanted = config.tokens.norm_target
    targets = {}
    for name, embedding in embeddings.items():
        targets[name] = _norm_target(embedding, wanted)
        if stages_that_stop(config):
            targets[name] = torch.full_like(targets[name], wanted or STOP_NORM)
            start = float(embedding.initial.norm(dim=-1).mean())
            if start >= (wanted or STOP_NORM):
                raise UserError(
                    f"--tokens.norm stop would stop the token rows of {name} before the first "
                    f"step: their mean norm is {start:.3g} at the start, and they stop at "
                    f"{wanted or STOP_NORM:g}; raise --tokens.norm-target or choose another "
                    "--tokens.init"
                )
    return targets


def describe_learned_tokens(
    learned: Sequence[Mapping[str, Any]], placeholders: Sequence[Placeholder]
) -> list[str]:
    """A line for each learned token: its norm, distance from its start and nearest words.

    `learned` are the tokens' reports as dictionaries, with their text encoder's key. Tokens of a
    word for each layer have one line for all layers.
    """
    encoders = list(dict.fromkeys(entry["encoder"] for entry in learned))
    lines = []
    for encoder in encoders:
        of_encoder = f" of {encoder}" if len(encoders) > 1 else ""
        entries = {entry["name"]: entry for entry in learned if entry["encoder"] == encoder}
        for placeholder in placeholders:
            for i, name in enumerate(placeholder.names_at(0)):
                if not placeholder.layers:
                    lines.append(f"{name}{of_encoder}: {_describe_token(entries[name])}")
                    continue
                names = [placeholder.names_at(layer)[i] for layer in range(placeholder.layers)]
                told = _describe_layers([entries[name] for name in names])
                lines.append(f"{name} to {names[-1]}{of_encoder}, {len(names)} layers: {told}")
    return lines


def _describe_token(entry: Mapping[str, Any]) -> str:
    near = [f"{_shown_word(word)} {cosine:.2f}" for word, cosine in entry["nearest"]]
    moved = f"norm {entry['norm']:.3f}, moved {entry['drift']:.3f}"
    return f"{moved}, nearest {', '.join(near)}"


def _describe_layers(entries: Sequence[Mapping[str, Any]]) -> str:
    """Ranges over the layers; the word that is nearest in most of them first."""
    ranges = []
    for name, key in (("norm", "norm"), ("moved", "drift")):
        values = [entry[key] for entry in entries]
        ranges.append(f"{name} {min(values):.3f} to {max(values):.3f}")
    nearest = Counter(_shown_word(entry["nearest"][0][0]) for entry in entries)
    near = [f"{word} in {count}" for word, count in nearest.most_common(MOST_WORDS)]
    return f"{', '.join(ranges)}, nearest {', '.join(near)}"


def _shown_word(entry: str) -> str:
    """An entry of the vocabulary without CLIP's mark of a word's end."""
    return entry.removesuffix("</w>")


def stages_that_stop(config: Config) -> bool:
    """Whether a stage stops its token rows at a norm."""
    return any(
        "tokens" in stage.groups and (stage.norm or config.tokens.norm) == "stop"
        for stage in config.stages
    )


def _count_text_layers(family: Family) -> int:
    """The number of cross-attention layers. Raises UserError for a model without any."""
    layers = len(family.layout.cross_attention)
    if not layers:
        raise UserError(
            f"--tokens.per-layer needs layers of cross-attention, which the model ({family.name}) "
            "has not: its image and text attend to each other as one sequence; leave it out"
        )
    return layers


def _norm_target(embedding: tokens.LearnedEmbedding, wanted: float) -> Tensor:
    """[n, 1] target norms of the norm prior: the rows' initial norms, unless one is given (0.4 in
    lora_pti: SD 1.5's usual norm). Rows that start at zero take the vocabulary's mean norm.
    """
    start = embedding.initial.norm(dim=-1, keepdim=True)
    if wanted:
        return torch.full_like(start, wanted)
    usual = embedding.weight.detach().to(start).norm(dim=-1).mean()
    return torch.where(start > 0, start, usual)
