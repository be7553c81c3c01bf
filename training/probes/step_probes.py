"""Probes of the options of model, adapters, tokens and losses."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import distributed, plugins
from lora_core.adapters.adapted_layer import Adapted, adapted_layers
from lora_core.adapters.kinds import KINDS
from lora_core.config import Config
from lora_core.diffusion import losses, noise
from lora_core.tokens import LearnedEmbedding, is_random_init
from models import DTYPES
from models.placement import named_blocks
from training import step
from training.probes import input_probes
from training.probes.first_step import FirstStep, Probe, forward_calls

# ---------------------------------------------------------------- model and adapters


def has_precision(first: FirstStep) -> bool | None:
    """--precision: whether frozen weights of the denoiser have it, unless they are quantized."""
    if first.config.quantize != "none":
        return None
    frozen = [p for p in first.model.denoiser.parameters() if not p.requires_grad]
    return any(p.dtype == DTYPES[first.config.precision] for p in frozen)


def has_vae_precision(first: FirstStep) -> bool:
    """--vae-precision: whether the VAE has it."""
    dtypes = {p.dtype for p in first.model.family.modules["vae"].parameters()}
    return DTYPES[first.config.vae_precision] in dtypes


def multiplies_in_bf16(first: FirstStep) -> bool | None:
    """--autocast: whether the denoiser runs under it and its products are in bf16."""
    if not first.can_compare:
        return None
    device = first.model.device.type
    found: list[bool] = []
    with forward_calls(first.model.denoiser, found, lambda: torch.is_autocast_enabled(device)):
        first.losses(losses.mse)
    return bool(found) and found[0] and torch.get_autocast_dtype(device) == torch.bfloat16


def recomputes(first: FirstStep) -> bool | None:
    """--gradient-checkpointing: whether a block's forward runs again in the backward pass."""
    blocks = list(named_blocks(first.model.denoiser).values())
    if not blocks or not first.can_compare:
        return None
    found: list[bool] = []
    x = replace(first.inputs[-1], readings={})
    with ExitStack() as stack:
        for block in blocks:  # some may come before the first layer that trains
            is_backward = forward_calls(block, found, in_backward)
            stack.enter_context(is_backward)
        rows = first.functions.step(first.model, x, first.config, losses.mse)
        trained = chain(*(first.model.groups[name] for name in first.stage.groups))
        torch.autograd.grad(rows.sum(), list(trained), allow_unused=True)
    return any(found)


def in_backward() -> bool:
    """Whether autograd is running."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_compiled(first: FirstStep) -> bool:
    """--compile: whether blocks of the denoiser are compiled."""
    modules = first.model.denoiser.modules()
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)


def reaches_adapters(option: str) -> Probe:
    """Whether an adapter has the option's value in its settings."""

    def probe(first: FirstStep) -> bool | None:
        wanted = getattr(first.config.adapter, option)
        specs = [spec for layer in _layers(first) if (spec := _spec(layer)) is not None]
        return any(getattr(spec, option) == wanted for spec in specs) if specs else None

    return probe


def scales_adapters(first: FirstStep) -> bool | None:
    """--adapter.alpha, rslora: whether an update has the scale that they give."""
    a = first.config.adapter
    specs = [spec for layer in _layers(first) if (spec := _spec(layer)) is not None]
    if not specs or a.alpha_pattern:
        return None
    found = []
    for spec in specs:
        divisor = math.sqrt(spec.rank) if a.rslora else spec.rank
        found.append(math.isclose(spec.scale, (a.alpha or spec.rank) / divisor))
    return any(found) or first.config.from_lora != ""


def drops(option: str) -> Probe:
    """Whether an adapter drops inputs, ranks or itself for some example of enough."""

    def probe(first: FirstStep) -> bool | None:
        draws = input_probes.enough_draws(getattr(first.config.adapter, option))
        found = [layer for layer in _layers(first) if isinstance(layer.base, nn.Linear)]
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
    """Whether a layer gives different outputs for equal rows, with one kind of dropout alone."""
    adapter = layer.adapter("default")
    others = dict.fromkeys(("dropout", "rank_dropout", "module_dropout"), 0.0)
    spec, keys = adapter.spec, adapter.row_keys
    before = [p.detach().clone() for p in adapter.parameters()]
    try:
        for p in adapter.parameters():
            p.fill_(0.1)
        adapter.spec = replace(spec, **(others | {option: getattr(spec, option)}))
        adapter.row_keys = torch.arange(rows, device=keys.device)
        x = torch.ones(rows, layer.base.weight.shape[1], device=keys.device)
        out = adapter(layer.base, x.to(layer.base.weight.dtype), 1.0)
        return bool((out != out[:1]).any())
    finally:
        adapter.spec, adapter.row_keys = spec, keys
        for p, old in zip(adapter.parameters(), before):
            p.copy_(old)


def _layers(first: FirstStep) -> list[Adapted]:
    found: list[Adapted] = []
    for module in first.model.adapted.values():
        found += adapted_layers(module)
    return found


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


# ---------------------------------------------------------------- the loss


def differs_from_mse(first: FirstStep) -> bool | None:
    """--loss: whether a built-in loss gives other numbers than mse."""
    if first.config.loss not in losses.LOSSES or not first.can_compare:
        return None
    if not torch.equal(first.losses(first.functions.loss), first.mse):
        return True
    return False if _compares_attention(first) else None


def _compares_attention(first: FirstStep) -> bool:
    """Whether a loss that reads attention has something to compare: an image with an uneven mask
    whose caption has learned tokens. True of other losses.
    """
    x, places = first.inputs[-1], first.inputs[-1].caption_tokens.learned
    if not getattr(first.functions.loss, "reads_attention", False):
        return True
    if x.mask is None or places is None:
        return False
    has_tokens = (places >= 0).any(1)
    masks = x.mask.flatten(1)
    return bool((has_tokens & (masks.amax(1) > masks.amin(1))).any())


def changes_loss(first: FirstStep) -> bool | None:
    """--loss-arg: whether each argument of a built-in loss changes its numbers, unless it is at its
    default.
    """
    c = first.config
    function = losses.LOSSES.get(c.loss)
    if function is None or not first.can_compare:
        return None
    shown = None
    for name in input_probes.differing_arguments(function, c.loss_arg):
        others = {key: value for key, value in c.loss_arg.items() if key != name}
        own, other = (
            first.losses(plugins.find_plugin(c.loss, losses.LOSSES, "loss", args))
            for args in (c.loss_arg, others)
        )
        if not torch.equal(own, other):
            shown = True
        elif _compares_attention(first):
            return False
    return shown


def weights_levels(first: FirstStep) -> bool | None:
    """--weighting: whether the losses are weighted, where a weight of the step is not 1; else
    whether some noise level's is not.
    """
    if not first.can_compare or first.functions.weights_itself:
        return None
    usual = replace(first.config, weighting=Config().weighting, weighting_arg={})
    x = first.inputs[-1]
    own, other = (_weights(first, c, x.level) for c in (first.config, usual))
    if torch.allclose(own, other, rtol=1e-5):  # less than a loss in fp32 would show
        return _differs_at_some_level(first, first.config, usual)
    return not torch.equal(first.mse, first.losses(losses.mse, config=usual))


def changes_weights(first: FirstStep) -> bool | None:
    """--weighting-arg: whether each argument changes some weight, unless it is at its default."""
    c = first.config
    function = losses.WEIGHTINGS.get(c.weighting)
    if function is None:
        return None
    shown = None
    for name in input_probes.differing_arguments(function, c.weighting_arg):
        others = {key: value for key, value in c.weighting_arg.items() if key != name}
        if not _differs_at_some_level(first, c, replace(c, weighting_arg=others)):
            return False
        shown = True
    return shown


def _weights(first: FirstStep, c: Config, level: noise.NoiseLevel) -> Tensor:
    prediction, space = first.model.family.prediction, c.noise.space
    return losses.loss_weights(c.weighting, level, prediction, space=space, **c.weighting_arg)


def _differs_at_some_level(first: FirstStep, a: Config, b: Config) -> bool:
    u = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    level = noise.levels_at_quantiles(first.model.family.schedule.to("cpu"), u)
    return not torch.equal(_weights(first, a, level), _weights(first, b, level))


def changes_space(first: FirstStep) -> bool | None:
    """--noise.space: whether the errors are others than in the model's."""
    if not first.can_compare:
        return None
    usual = replace(first.config, noise=replace(first.config.noise, space="model"))
    own, other = (first.losses(_unweighted_mse, config=c) for c in (first.config, usual))
    return not torch.equal(own, other)


def _unweighted_mse(output: losses.StepOutput) -> Tensor:
    return losses.mse(output)


_unweighted_mse.weighting = "none"  # type: ignore[attr-defined]


def has_prediction(first: FirstStep) -> bool:
    """--noise.prediction: whether the targets are of that kind."""
    return first.model.family.prediction == first.config.noise.prediction


def reads_guidance(first: FirstStep) -> bool | None:
    """--noise.guidance: whether the losses are others than at the default scale."""
    if not first.can_compare:
        return None
    usual = replace(first.model, guidance=Config().noise.guidance)
    return not torch.equal(first.mse, first.losses(losses.mse, model=usual))


def preserves(first: FirstStep) -> bool | None:
    """--prior.swap, outside-mask: whether the loss runs the forward passes that they cost."""
    if not first.can_compare:
        return None
    prior, x = first.config.prior, first.inputs[-1]
    expected = 1 + 2 * bool(prior.swap)
    if prior.outside_mask and (x.mask is not None or x.unweighted_mask is not None):
        expected += 1
    calls: list[None] = []
    with forward_calls(first.model.denoiser, calls, lambda: None):
        first.losses(first.functions.loss)
    return len(calls) >= expected


# ---------------------------------------------------------------- the batch and the machine


def accumulates(first: FirstStep) -> bool:
    """--accumulation: whether the step had so many forward passes, of which processes share."""
    return len(first.inputs) == -(-first.config.passes_per_step // distributed.process_count())


def has_batch_size(first: FirstStep) -> bool:
    """--batch-size: whether the step had so many images, which processes share."""
    images = first.config.images_per_step * (2 if first.config.data.pairs else 1)
    own = sum(int((~x.is_prior).sum()) for x in first.inputs)
    return distributed.process_count() > 1 or own == images


def has_threads(first: FirstStep) -> bool:
    """--threads: whether torch computes with so many."""
    return torch.get_num_threads() == first.config.threads
