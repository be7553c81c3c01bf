"""Probes of the options of adapters and learned tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lora_core.adapters.adapted_layer import Adapted, layers_with_adapter
from lora_core.adapters.kinds import KINDS, kind_class
from lora_core.adapters.targets import last_match, matches_pattern
from lora_core.tokens import LearnedEmbedding, is_random_init
from training import step
from training.probes import input_probes
from training.probes.first_step import FirstStep, Probe

# ---------------------------------------------------------------- which layers have adapters


def adapts_denoiser(first: FirstStep) -> bool | None:
    """--adapter.targets: whether each pattern has layers with adapters in the denoiser, and each
    such layer a pattern.
    """
    return _adapts_as_asked(first, "denoiser", first.config.adapter.targets)


def adapts_text_encoders(first: FirstStep) -> bool | None:
    """--adapter.text-targets: the same in the text encoders."""
    return _adapts_as_asked(first, "text_encoder", first.config.adapter.text_targets)


def _adapts_as_asked(first: FirstStep, group: str, names: tuple[str, ...]) -> bool | None:
    """Whether the layers with adapters are those that targets name; None where none train."""
    family = first.model.family
    if not first.config.trains(group):
        return None
    for part, presets in family.layout.presets.items():
        if (part in family.tokenizers) != (group == "text_encoder"):
            continue
        globs = list(chain(*(presets.get(name, (name,)) for name in names)))
        found = list(layers_with_adapter(family.modules[part], "default"))
        if not all(any(matches_pattern(path, glob) for glob in globs) for path in found):
            return False
        if first.config.adapter.exclude:  # may leave a pattern without layers
            continue
        if not all(any(matches_pattern(path, glob) for path in found) for glob in globs):
            return False
    return True


def excludes_layers(first: FirstStep) -> bool:
    """--adapter.exclude: whether no layer that it names has an adapter."""
    paths = [path for path, _ in _layers(first)]
    return not any(
        any(matches_pattern(path, glob) for path in paths) for glob in first.config.adapter.exclude
    )


def has_kind(first: FirstStep) -> bool:
    """--adapter.kind: whether all adapters are of that class."""
    wanted: Any = kind_class(first.config.adapter.kind)
    return all(isinstance(layer.adapter("default"), wanted) for _, layer in _layers(first))


# ---------------------------------------------------------------- their settings


def reaches_adapters(option: str) -> Probe:
    """Whether an adapter has the option's value in its settings."""

    def probe(first: FirstStep) -> bool | None:
        wanted = getattr(first.config.adapter, option)
        specs = [spec for _, spec in _specs(first)]
        return any(getattr(spec, option) == wanted for spec in specs) if specs else None

    return probe


def has_rank(first: FirstStep) -> bool | None:
    """--adapter.rank: whether each adapter whose layer matches no pattern has it."""
    a = first.config.adapter
    return _all_or_none([spec.rank == a.rank for _, spec in _specs(first, without=a.rank_pattern)])


def has_pattern_ranks(first: FirstStep) -> bool | None:
    """--adapter.rank-pattern: whether each adapter whose layer matches a pattern has the rank of
    the last one.
    """
    table = first.config.adapter.rank_pattern
    found = [(last_match(path, table, None), spec.rank) for path, spec in _specs(first)]
    return _all_or_none([rank == wanted for wanted, rank in found if wanted is not None])


def has_scale(first: FirstStep) -> bool | None:
    """--adapter.alpha and rslora: whether each update whose layer matches no pattern has the scale
    that they give.
    """
    a = first.config.adapter
    found = []
    for _, spec in _specs(first, without=a.alpha_pattern):
        found.append(math.isclose(spec.scale, _scale(first, a.alpha or spec.rank, spec.rank)))
    return _all_or_none(found)


def has_pattern_scales(first: FirstStep) -> bool | None:
    """--adapter.alpha-pattern: the same of layers that match a pattern."""
    table = first.config.adapter.alpha_pattern
    found = []
    for path, spec in _specs(first):
        if alpha := last_match(path, table, None):
            found.append(math.isclose(spec.scale, _scale(first, alpha, spec.rank)))
    return _all_or_none(found)


def _scale(first: FirstStep, alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if first.config.adapter.rslora else rank)


def _all_or_none(found: Sequence[bool]) -> bool | None:
    """Whether all are true; None where there are none."""
    return all(found) if found else None


def drops(option: str) -> Probe:
    """Whether an adapter drops inputs, ranks or itself for some example of enough."""

    def probe(first: FirstStep) -> bool | None:
        draws = input_probes.enough_draws(getattr(first.config.adapter, option))
        found = [layer for _, layer in _layers(first) if isinstance(layer.base, nn.Linear)]
        if draws is None or not found or _spec(found[0]) is None:
            return None
        if first.config.adapter.kind not in KINDS:  # may know the images of this batch alone
            return None
        if first.inputs[-1].dropout_keys is None:
            return False
        return _differs_by_row(found[0], option, draws)

    return probe


@torch.no_grad()
def _differs_by_row(layer: Adapted, option: str, rows: int) -> bool:
    """Whether a layer's adapter gives different outputs for equal rows, with one kind of dropout
    alone, on weights of its own: those of the layer may be divided, streamed or packed.
    """
    adapter = layer.adapter("default")
    linear: Any = layer.base
    others = dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), 0.0)
    spec, keys = adapter.spec, adapter.row_keys
    before = [p.detach().clone() for p in adapter.parameters()]
    try:
        for p in adapter.parameters():
            p.fill_(0.1)
        adapter.spec = replace(spec, **(others | {option: getattr(spec, option)}))
        adapter.row_keys = torch.arange(rows, device=keys.device)
        like: Any = {"device": keys.device, "dtype": before[0].dtype}
        base = nn.Linear(linear.in_features, linear.out_features, **like)
        out = adapter(base, torch.ones(rows, linear.in_features, **like), 1.0)
        return bool((out != out[:1]).any())
    finally:
        adapter.spec, adapter.row_keys = spec, keys
        for p, old in zip(adapter.parameters(), before):
            p.copy_(old)


def _layers(first: FirstStep) -> Iterator[tuple[str, Adapted]]:
    """(path, layer) of all layers with adapters."""
    for module in first.model.adapted.values():
        yield from layers_with_adapter(module, "default").items()


def _specs(
    first: FirstStep, *, without: Mapping[str, float] = MappingProxyType({})
) -> Iterator[tuple[str, Any]]:
    """(path, settings) of the adapters that have any, `without` those of layers that match one of
    these patterns.
    """
    for path, layer in _layers(first):
        spec = _spec(layer)
        if spec is not None and last_match(path, without, None) is None:
            yield path, spec


def _spec(layer: Adapted) -> Any:
    return getattr(layer.adapter("default"), "spec", None)


# ---------------------------------------------------------------- tokens


def learns_words(first: FirstStep) -> bool:
    """--tokens.words: whether each has tokens with rows in the text encoders."""
    names = set(chain(*(embedding.names for embedding in first.model.embeddings.values())))
    words = {p.word for p in first.model.placeholders if names.issuperset(p.names)}
    return words == set(first.config.tokens.words)


def learns_in_encoders(first: FirstStep) -> bool:
    """--tokens.encoders: whether these have rows, and no others."""
    layout = first.model.family.layout
    return {layout.encoders[name] for name in first.model.embeddings} == set(
        first.config.tokens.encoders
    )


def has_vectors(first: FirstStep) -> bool:
    """--tokens.vectors: whether each word has so many tokens."""
    wanted = first.config.tokens.vectors
    found = [len(p.names_at(0)) for p in first.model.placeholders]
    return all(count == wanted for count in found) if wanted else all(found)


def has_names(first: FirstStep) -> bool:
    """--tokens.names: whether the token rows have these names, in their order."""
    wanted = first.config.tokens.names
    return all(own.names == wanted for own in first.model.embeddings.values())


def has_layers(first: FirstStep) -> bool:
    """--tokens.per-layer: whether each layer has its own tokens."""
    return all(p.layers > 1 for p in first.model.placeholders)


def starts_as_asked(first: FirstStep) -> bool | None:
    """--tokens.init: whether the first row starts as 0, or as a row of the table for a word."""
    first_init = first.model.placeholders[0].init
    embeddings = first.model.embeddings.values()
    if first_init in ("zero", "<zero>"):
        return all(not bool(e.initial[0].any()) for e in embeddings)
    if first.config.from_lora or "+" in first_init or is_random_init(first_init):
        return None
    return all(_is_row_of_table(e) for e in embeddings)


def _is_row_of_table(embedding: LearnedEmbedding) -> bool:
    start = embedding.initial[:1].to(embedding.weight)
    return bool((embedding.weight.detach() == start).all(1).any())


def aims_at_norm(first: FirstStep) -> bool:
    """--tokens.norm-target: whether it is the target of every row."""
    wanted, targets = first.config.tokens.norm_target, first.model.norm_targets.values()
    return all(torch.equal(target, torch.full_like(target, wanted)) for target in targets)


def controls_usual_norms(first: FirstStep) -> bool | None:
    """--tokens.norm: the same as `controls_norms`, in a stage that has no norm of its own."""
    return None if first.stage.norm else controls_norms(first)


@torch.no_grad()
def controls_norms(first: FirstStep) -> bool | None:
    """--stages.I.norm: whether it changes rows that are twice as long as they were."""
    how = first.stage.norm or first.config.tokens.norm
    if bool(first.optimization.skip):
        return None
    is_still = any(g["name"] == "tokens" and float(g["lr"]) == 0 for g in first.groups)
    if how == "none" or "tokens" not in first.stage.groups or (is_still and how == "pull"):
        return None
    model = first.model
    rows = {name: e.rows.detach().clone() for name, e in model.embeddings.items()}
    before = {}
    for name, e in model.embeddings.items():
        before[name] = 3 * rows[name] + 100 * model.norm_targets[name].max()  # beyond any target
        e.rows.copy_(2 * rows[name] + 1)
    try:
        step.control_token_norms(model, first.optimization, first.stage, first.config, before)
        return all(
            not torch.equal(e.rows, 2 * rows[name] + 1) for name, e in model.embeddings.items()
        )
    finally:
        for name, e in model.embeddings.items():
            e.rows.copy_(rows[name])
