"""One step of an optimiser on parameters of a few numbers, before any weight is read: what this
loop asks of it, it can do or is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_core.errors import UserError
from lora_core.optim import schedules
from lora_core.runs.run_folder import flatten_state, unflatten_state

SHAPE = (
    64,
    64,
)  # a matrix, as down, up and token rows are; bitsandbytes keeps smaller ones in fp32, adv_optm's Muon takes none of them
STEPS = 2  # the first ones, in which state is made


def try_optimizer(
    name: str,
    settings: Mapping[str, Mapping[str, Any]],
    args: Mapping[str, Any],
    device: torch.device,
) -> list[str]:
    """Sentences of warning about an optimiser that works, as it is given: `settings` of each group
    (optim.group_settings), `args` of its class.

    Raises UserError for a class or package that is not there, for settings it refuses, for one
    whose step needs a closure, fails, or cannot be steered by the learning rates of its groups, and
    for one whose state a checkpoint cannot hold. Draws from no generator that is used elsewhere.
    """
    step, known = schedules.resolve_optimizer(name).step, schedules.optimizer_arguments(name)
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"optimizer {name} wants to compute the loss itself (step needs a closure), which this loop has none of; choose another"
        )
    if "lr" not in known and not any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()
    ):
        raise UserError(
            f"optimizer {name} takes no lr, by which groups, stages and schedules steer it; choose another or give its class one"
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        params = _parameters(settings, device)
        optimizer = _build_groups(name, params, settings, args)
        if name in schedules.OPTIMIZERS:  # ours: tests hold all of this
            return []
        _check_groups(name, optimizer, settings)
        try:
            _run_steps(optimizer, params)
        except Exception as error:  # of a class that may be anybody's
            raise UserError(
                f"optimizer {name} fails in its first steps: {_one_sentence(error)}; choose another or mend its arguments"
            ) from error
        try:
            tensors, meta = flatten_state(optimizer.state_dict())
        except TypeError as error:
            raise UserError(
                f"optimizer {name} has a state that no checkpoint holds: {error}; choose another"
            ) from error
        saved = unflatten_state({key: value.clone() for key, value in tensors.items()}, meta)
        return _check_resume(
            name,
            (optimizer, params),
            saved,
            _parameters(settings, device, like=params),
            settings,
            args,
        )


def _build_groups(
    name: str,
    params: Mapping[str, nn.Parameter],
    settings: Mapping[str, Mapping[str, Any]],
    args: Mapping[str, Any],
) -> torch.optim.Optimizer:
    groups = [{"params": [p], **settings[group]} for group, p in params.items()]
    optimizer = schedules.build_optimizer(name, schedules.split_lora_plus(groups, {}, 1.0), args)
    if schedules.is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _parameters(
    groups: Mapping[str, Any], device: torch.device, like: Mapping[str, nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = {
        group: torch.randn(SHAPE, generator=generator)
        if like is None
        else like[group].detach().clone()
        for group in groups
    }
    return {group: nn.Parameter(value.to(device)) for group, value in values.items()}


def _run_steps(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> None:
    torch.manual_seed(0)  # inside fork_rng: for classes that round at random
    for _ in range(STEPS):
        with schedules.use_evaluation_parameters(
            optimizer
        ):  # as at validations, of which one is before the first step
            pass
        for p in params.values():
            p.grad = p.detach().clone()
        optimizer.step()


def _check_groups(
    name: str, optimizer: torch.optim.Optimizer, settings: Mapping[str, Mapping[str, Any]]
) -> None:
    kept = [group for group in optimizer.param_groups if {"name", "lr", "ratio"} <= group.keys()]
    if [group["name"] for group in kept] != list(settings) or len(kept) != len(
        optimizer.param_groups
    ):
        raise UserError(
            f"optimizer {name} arranges its groups anew, so that stages cannot steer them by name; choose another"
        )


def _check_resume(
    name: str,
    run: tuple[torch.optim.Optimizer, Mapping[str, nn.Parameter]],
    saved: dict[str, Any],
    params: Mapping[str, nn.Parameter],
    settings: Mapping[str, Mapping[str, Any]],
    args: Mapping[str, Any],
) -> list[str]:
    """A sentence where a new optimiser does not go on from a saved state as the run does that saved
    it; `params` are its parameters at that time.
    """
    again = _build_groups(name, params, settings, args)
    try:
        again.load_state_dict(saved)
        _run_steps(again, params)
    except Exception as error:  # of a class that may be anybody's
        return [
            f"optimizer {name} cannot take up a state it saved ({_one_sentence(error)}), so that this run cannot be resumed"
        ]
    _run_steps(*run)
    (ours, numbers), (theirs, others) = (
        flatten_state(optimizer.state_dict()) for optimizer in (again, run[0])
    )
    alike = numbers == others and all(
        torch.equal(value, theirs[key]) for key, value in ours.items()
    )
    if alike and all(torch.equal(p, run[1][group]) for group, p in params.items()):
        return []
    return [
        f"optimizer {name} does not go on from a saved state with the same bits, and neither will this run when it is resumed"
    ]


def _one_sentence(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
