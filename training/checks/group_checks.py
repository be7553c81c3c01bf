"""Checks of a config's parameter groups: settings of groups that do not train, and schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.optim import schedules
from lora_core.stage_settings import GROUPS


def stage_schedules(c: Config, stage: Stage) -> dict[str, list[str]]:
    """Schedule -> the groups that it steers in a stage."""
    found: dict[str, list[str]] = {}
    for group in stage.groups:
        found.setdefault(stage.schedule_of(group, c.optimizer), []).append(group)
    return found


def check_groups(c: Config) -> None:
    """Raises UserError for settings of groups that no stage trains."""
    trained = {group for group in GROUPS if c.trains(group)}
    o = c.optimizer
    tables: dict[str, Mapping[str, Any]] = {
        "lr": o.lr,
        "weight-decay": o.weight_decay,
        "betas": o.betas,
        "schedules": o.schedules,
    }
    for option, table in tables.items():
        if unknown := set(table) - trained:
            names = ", ".join(sorted(unknown))
            raise UserError(f"--optimizer.{option} names {names}, which no stage trains")
    for group in o.schedules:
        numbers = [i for i, stage in enumerate(c.stages) if group in stage.groups]
        stages = [c.stages[i] for i in numbers]
        if all(stage.schedule or group in stage.schedules for stage in stages):
            raise UserError(
                f"--optimizer.schedules {group}={o.schedules[group]} has no effect: every stage "
                f"that trains {group} has a schedule of its own; "
                f"give --stages.{numbers[0]}.schedules"
            )


def check_schedules(c: Config) -> None:
    """Raises UserError for a learning rate that a stage never reaches or that its schedule does
    not give.
    """
    o = c.optimizer
    for i, stage in enumerate(c.stages):
        warmup = stage.warmup_of(o)
        if warmup > stage.steps:
            flag = "--optimizer.warmup" if stage.warmup is None else f"--stages.{i}.warmup"
            raise UserError(
                f"{flag} is {warmup} steps, longer than stage {i} of {stage.steps}, "
                "which would end before its learning rate is reached; "
                f"lower it or raise --stages.{i}.steps"
            )
        for name in stage_schedules(c, stage):
            arguments = o.schedule_args if name == o.schedule else {}
            multiplier = schedules.resolve_schedule(name, **arguments)
            factors = [multiplier(step, stage.steps, warmup) for step in range(stage.steps)]
            if not any(factors):
                raise UserError(
                    f"schedule {name} is 0 in all {stage.steps} steps of stage {i}, which would "
                    "train nothing; choose another, or correct its arguments"
                )
