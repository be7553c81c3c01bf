"""Probes of the options of model, adapters, tokens, losses and optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import distributed, plugins
from lora_core.adapters.adapted_layer import Adapted, adapted_layers
from lora_core.config import Config
from lora_core.diffusion import losses, noise
from lora_core.optim import building, schedules
from lora_core.optim.ema import ParameterAverage
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
    with forward_calls(blocks[-1], found, lambda: torch._C._current_graph_task_id() != -1):
        rows = first.functions.step(first.model, x, first.config, losses.mse)
        trained = chain(*(first.model.groups[name] for name in first.stage.groups))
        torch.autograd.grad(rows.sum(), list(trained), allow_unused=True)
    return any(found)


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
    return not torch.equal(first.losses(first.functions.loss), first.mse)


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
        if torch.equal(own, other):
            return False
        shown = True
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
    if torch.equal(own, other):
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


# ---------------------------------------------------------------- the optimizer


def reaches_parameters(first: FirstStep) -> bool | None:
    """--stages.I.groups: whether every parameter of the denoiser, and some of each other group, has
    a gradient, and a group's are not all 0 where captions leave it one. The last layers of a text
    encoder may be unread.
    """
    shown: bool | None = True
    for name in first.stage.groups:
        params = first.model.groups[name]
        grads = [p.grad for p in params if p.grad is not None]
        if not grads or (name == "denoiser" and len(grads) < len(params)):
            return False
        if not bool(torch.stack(torch._foreach_norm(grads)).any()):
            if not any(first.batch.dropped) and not first.model.gradient_hooks.get(name):
                return False
            shown = None
    return shown


def has_rates(first: FirstStep) -> bool:
    """--optimizer.lr and --stages.I.lr: whether rates are in the proportion that they say."""
    o, found = first.optimization, []
    for group in first.groups:
        name = group["name"]
        wanted = first.stage.lr.get(name, first.config.optimizer.lr.get(name))
        if wanted is None:
            continue
        schedule = o.rate_schedules[first.stage.schedule_of(name, first.config.optimizer)]
        begin = first.inputs[0].number - _stage_begin(first)
        factor = schedule(begin, first.stage.steps, first.config.optimizer.warmup)
        found.append(math.isclose(group["rate"], wanted * factor * group["ratio"]))
        near = 1e-6 if isinstance(group["lr"], Tensor) else 1e-9  # torchao keeps it in fp32
        found.append(math.isclose(float(group["lr"]), group["rate"], rel_tol=near, abs_tol=1e-300))
    return all(found)


def _stage_begin(first: FirstStep) -> int:
    """Steps before the stage."""
    stages = first.config.stages
    number = first.inputs[0].number
    begin = 0
    for stage in stages:
        if begin + stage.steps > number:
            break
        begin += stage.steps
    return begin


def has_setting(option: str) -> Probe:
    """--optimizer.weight-decay and betas: whether the optimizer's groups have them."""

    def probe(first: FirstStep) -> bool:
        table: dict[str, Any] = getattr(first.config.optimizer, option)
        if option == "weight_decay":
            table = table | first.stage.weight_decay
        groups = [group for group in first.groups if group["name"] in table]
        return all(_is_same(group.get(option), table[group["name"]]) for group in groups)

    return probe


def _is_same(found: Any, wanted: Any) -> bool:
    return tuple(found) == tuple(wanted) if isinstance(wanted, tuple | list) else found == wanted


def has_optimizer(first: FirstStep) -> bool:
    """--optimizer.name: whether it is of that class."""
    name = first.config.optimizer.name
    return isinstance(first.optimization.optimizer, building.resolve_optimizer(name))


def has_arguments(first: FirstStep) -> bool:
    """--optimizer.args: whether the optimizer's settings hold them, where it shows settings."""
    defaults = first.optimization.optimizer.defaults
    arguments = first.config.optimizer.args
    return all(_is_same(defaults[name], v) for name, v in arguments.items() if name in defaults)


def moves_rate(first: FirstStep) -> bool | None:
    """--optimizer.schedule and its relatives: whether a rate is not constant over the stage."""
    o, steps = first.config.optimizer, first.stage.steps
    shown = None
    for group in first.stage.groups:
        name = first.stage.schedule_of(group, o)
        if name == "constant" or steps < 3:
            continue
        multiplier = first.optimization.rate_schedules[name]
        places = sorted({0, 1, steps // 3, steps // 2, 2 * steps // 3, steps - 2, steps - 1})
        if len({multiplier(i, steps, 0) for i in places}) > 1:
            shown = True
        elif name in schedules.SCHEDULES and name not in ("wsd", "cosine_restarts"):
            return False
    return shown


def warms_up(first: FirstStep) -> bool:
    """--optimizer.warmup: whether the first rate is lower than the one after it."""
    o, steps = first.config.optimizer, first.stage.steps
    names = {first.stage.schedule_of(group, o) for group in first.stage.groups}
    multipliers = [first.optimization.rate_schedules[name] for name in names]
    return all(m(0, steps, o.warmup) < m(o.warmup, steps + 1, o.warmup) for m in multipliers)


def has_two_rates(first: FirstStep) -> bool | None:
    """--optimizer.lora-plus: whether parameters of a group have the ratio of learning rates."""
    groups = [group for group in first.groups if group["name"] != "tokens"]
    if not groups:
        return None
    rates: dict[str, set[float]] = {}
    for group in groups:
        rates.setdefault(group["name"], set()).add(float(group["ratio"]))
    return all(any(ratio != 1 for ratio in own) for own in rates.values())


def clips(first: FirstStep) -> bool | None:
    """--optimizer.clip: whether the gradient's norm is at most that after the step."""
    limit = first.config.optimizer.clip
    if bool(first.optimization.skip):
        return None
    if not 0 < limit < math.inf or first.config.optimizer.name not in building.OPTIMIZERS:
        return None
    grads: list[Tensor] = []
    for name in first.stage.groups:
        grads += [p.grad for p in first.model.groups[name] if p.grad is not None]
    norms = torch._foreach_norm(grads)
    norm = torch.linalg.vector_norm(torch.stack(norms).double())
    return bool(norm <= limit * (1 + 1e-3))


def accumulates(first: FirstStep) -> bool:
    """--accumulation: whether the step had so many forward passes, of which processes share."""
    return len(first.inputs) == -(-first.config.passes_per_step // distributed.process_count())


def has_batch_size(first: FirstStep) -> bool:
    """--batch-size: whether the step had so many images, which processes share."""
    images = first.config.images_per_step * (2 if first.config.data.pairs else 1)
    own = sum(int((~x.is_prior).sum()) for x in first.inputs)
    return distributed.process_count() > 1 or own == images


def averages(first: FirstStep) -> bool | None:
    """--ema: whether the average of this step was made, and lags behind parameters that move."""
    average = first.optimization.average
    if average is None:
        return False
    if bool(first.optimization.skip):
        return None
    p = nn.Parameter(torch.zeros(2))
    own = ParameterAverage([p], first.config.ema)
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(2):
        own.update_()
    return average.count > 0 and bool(((own.averages[0] > 0) & (own.averages[0] < 1)).all())


def has_threads(first: FirstStep) -> bool:
    """--threads: whether torch computes with so many."""
    return torch.get_num_threads() == first.config.threads
