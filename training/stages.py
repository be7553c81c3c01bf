"""The stages of a run: when each begins, which groups it trains, and at which learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_core.config import Config, Stage
from lora_core.option_types import ALL_GROUPS
from lora_core.stage_settings import GROUPS
from training.setup import Model, Optimization


def resolve_group_numbers(config: Config) -> Config:
    """The config with each learning rate and weight decay for all groups as one for each.

    Of [optimizer] these are the groups that some stage trains, of a stage its own; a group's own
    number comes first.
    """
    trained = [group for group in GROUPS if config.trains(group)]
    stages = tuple([_name_groups(stage, stage.groups) for stage in config.stages])
    return replace(config, optimizer=_name_groups(config.optimizer, trained), stages=stages)


def _name_groups(options: Any, groups: Sequence[str]) -> Any:
    changes = {}
    for name in ("lr", "weight_decay"):
        table = dict(getattr(options, name))
        if ALL_GROUPS in table:
            usual = table.pop(ALL_GROUPS)
            changes[name] = dict.fromkeys(groups, usual) | table
    return replace(options, **changes) if changes else options


def stage_spans(stages: Sequence[Stage]) -> Iterator[tuple[Stage, int, int]]:
    """(stage, its first step, one after its last) in order."""
    first = 0
    for stage in stages:
        yield stage, first, first + stage.steps
        first += stage.steps


def remaining_stages(stages: Sequence[Stage], done: int) -> Iterator[tuple[Stage, int, int, int]]:
    """(stage, its first step, the first that is not done, one after its last) of the stages that
    have steps left after `done` steps.
    """
    for stage, first, last in stage_spans(stages):
        if done < last:
            yield stage, first, max(first, done), last


def begin_stage(stage: Stage, config: Config, model: Model, optimization: Optimization) -> None:
    """Make the stage's groups trainable and freeze the others: no gradient, no update, unchanged
    optimizer state.
    """
    for name, params in model.groups.items():
        for p in params:
            p.requires_grad_(name in stage.groups)
            p.grad = None
    for group in optimization.optimizer.param_groups:
        if "weight_decay" in group:
            usual = optimization.weight_decays[group["name"]]
            group["weight_decay"] = stage.weight_decay.get(group["name"], usual)
    a = config.adapter
    drops = bool(a.dropout or a.rank_dropout or a.module_dropout)
    for module in model.networks:  # transformers recomputes in training mode only
        module.train(drops or config.gradient_checkpointing == "all")


def set_learning_rates(stage: Stage, step: int, config: Config, optimization: Optimization) -> None:
    """Set the learning rates of step number `step` of the stage; 0 for frozen groups. With
    --cuda-graph they are tensors, which a captured step reads.
    """
    o = config.optimizer
    factors: dict[str, float] = {}
    for name in stage.groups:
        schedule = stage.schedule_of(name, o)
        if schedule not in factors:
            multiplier = optimization.rate_schedules[schedule]
            factors[schedule] = multiplier(step, stage.steps, stage.warmup_of(o))
    for group in optimization.optimizer.param_groups:
        name = group["name"]
        group["rate"] = 0.0
        if name in stage.groups:
            rate = stage.lr.get(name, optimization.settings[name]["lr"])
            factor = factors[stage.schedule_of(name, o)]
            group["rate"] = rate * factor * group["ratio"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["rate"])
        elif config.cuda_graph:
            device = group["params"][0].device
            group["lr"] = torch.full((), group["rate"], dtype=torch.float64, device=device)
        else:
            group["lr"] = group["rate"]
