"""Probes of the options of the optimizer: groups, learning rates, clipping and the average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import norm_limits
from lora_core.adapters.adapted_layer import layers_with_adapter
from lora_core.adapters.targets import last_match
from lora_core.optim import building, schedules
from lora_core.optim.ema import ParameterAverage
from training import step
from training.probes.first_step import FirstStep, Probe
from training.probes.input_probes import differing_arguments

LONG_STAGE = 100  # steps, in which an argument of a schedule shows


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
            if not _may_be_still(first, name):
                return False
            shown = None
    return shown


def _may_be_still(first: FirstStep, name: str) -> bool:
    """Whether this batch may leave a group without a gradient: captions are dropped or lack the
    learned tokens, adapters drop themselves, hooks change gradients, or the losses are 0, as those
    of an image whose mask is black.
    """
    a, words = first.config.adapter, first.model.placeholders
    if any(first.batch.dropped) or first.model.gradient_hooks.get(name):
        return True
    if name == "tokens":
        text = " ".join(first.batch.captions)
        return not any(p.word in text or any(map(text.__contains__, p.names)) for p in words)
    if a.rank_dropout or a.module_dropout or a.dropout:
        return True
    return first.can_compare and not bool(first.losses(first.functions.loss).any())


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
        factor = schedule(begin, first.stage.steps, first.stage.warmup_of(first.config.optimizer))
        found.append(math.isclose(group["rate"], wanted * factor * group["ratio"]))
        found.append(_is_rate(group["lr"], group["rate"]))
    return all(found)


def _is_rate(found: float | Tensor, wanted: float) -> bool:
    """Whether a learning rate is the wanted one; some optimizers keep it as a tensor in fp32."""
    if isinstance(found, Tensor):
        return bool(found == torch.as_tensor(wanted, dtype=found.dtype))
    return math.isclose(found, wanted, abs_tol=1e-300)


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


def shapes_schedule(first: FirstStep) -> bool | None:
    """--optimizer.schedule-args: whether each argument changes a rate of the stage, unless it is at
    its default or the stage is too short to show it.
    """
    o, steps = first.config.optimizer, first.stage.steps
    names = {first.stage.schedule_of(group, o) for group in first.stage.groups}
    warmup = first.stage.warmup_of(o)
    if o.schedule not in names & schedules.SCHEDULES.keys() or warmup >= steps:
        return None
    shown = None
    own = first.optimization.rate_schedules[o.schedule]
    for argument in differing_arguments(schedules.SCHEDULES[o.schedule], o.schedule_args):
        others = {key: value for key, value in o.schedule_args.items() if key != argument}
        other = schedules.resolve_schedule(o.schedule, **others)
        if any(own(i, steps, warmup) != other(i, steps, warmup) for i in range(steps)):
            shown = True
        elif steps >= LONG_STAGE:
            return False
    return shown


def warms_up(first: FirstStep) -> bool | None:
    """--optimizer.warmup and --stages.I.warmup: whether the first rate is lower than the one after
    it, unless that of a schedule of the user's own is 0.
    """
    o, steps = first.config.optimizer, first.stage.steps
    warmup = first.stage.warmup_of(o)
    if not warmup:
        return None
    names = {first.stage.schedule_of(group, o) for group in first.stage.groups}
    multipliers = [first.optimization.rate_schedules[name] for name in names]
    rates = [(m(0, steps, warmup), m(warmup, steps + 1, warmup)) for m in multipliers]
    shown = [before < after for before, after in rates if after > 0]
    return all(shown) if shown else None


def has_two_rates(first: FirstStep) -> bool | None:
    """--optimizer.lora-plus: whether parameters of a group have the ratio of learning rates."""
    groups = [group for group in first.groups if group["name"] != "tokens"]
    if not groups:
        return None
    rates: dict[str, set[float]] = {}
    for group in groups:
        rates.setdefault(group["name"], set()).add(float(group["ratio"]))
    return all(any(ratio != 1 for ratio in own) for own in rates.values())


def has_layer_rates(first: FirstStep) -> bool:
    """--optimizer.lr-pattern: whether each layer that it names has a parameter with that rate."""
    pattern = first.config.optimizer.lr_pattern
    ratios: dict[Tensor, float] = {}
    for group in first.groups:
        ratios |= dict.fromkeys(group["params"], float(group["ratio"]))
    found = []
    for network in step.trained_networks(first.model, first.stage):
        for path, layer in layers_with_adapter(network, "default").items():
            factor = last_match(path, pattern, None)
            adapter = layer.adapter("default")
            if factor is not None and not getattr(adapter, "rates", {}):
                own = [ratios[p] for p in adapter.parameters()]
                found.append(any(math.isclose(ratio, factor) for ratio in own))
    return all(found)


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


def limits_updates(first: FirstStep) -> bool | None:
    """--optimizer.max-update-norm: whether no update of the stage's groups has a larger norm."""
    networks = step.trained_networks(first.model, first.stage)
    if not networks or bool(first.optimization.skip):
        return None
    limit = first.config.optimizer.max_update_norm
    return bool(norm_limits.largest_update_norm(networks) <= limit * (1 + 1e-5))


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
