"""Trial of an optimizer on two small matrices, before any weight is read: whether the training loop
can step it, set learning rates by group, save it and resume it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_core.errors import UserError, first_line
from lora_core.optim import building
from lora_core.optim.wrapped_tensors import load_state
from lora_core.runs.run_folder import flatten_state, unflatten_state

# A matrix, as down, up and token rows are; bitsandbytes keeps smaller ones in fp32, and adv_optm's
# Muon takes none of them.
SHAPE = (64, 64)
STEPS = 2  # the first ones, in which state is made

Settings = Mapping[str, Mapping[str, Any]]  # group -> its settings
Parameters = Mapping[str, nn.Parameter]  # group -> its only parameter


def try_optimizer(
    name: str, settings: Settings, args: Mapping[str, Any], device: torch.device
) -> list[str]:
    """Try an optimizer's first steps; returns warnings, as sentences, if it works.

    `settings` are those of building.group_settings, `args` further arguments of the class. Raises
    UserError for a class or package that does not exist, for settings it refuses, for one whose
    step needs a closure, fails, or ignores the learning rates of its groups, and for one whose
    state a checkpoint cannot hold. Uses no random generator of the run.
    """
    _check_signature(name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        params = _make_parameters(settings, device)
        optimizer = _build_groups(name, params, settings, args)
        if name in building.OPTIMIZERS:  # our own: tests hold all of this
            return []
        _check_groups(name, optimizer, settings)
        try:
            _run_steps(optimizer, params)
        except Exception as error:  # of any type: the class may be a user's
            raise UserError(
                f"optimizer {name} fails in its first steps: {_one_sentence(error)}; "
                "choose another or correct its arguments"
            ) from error
        try:
            tensors, meta = flatten_state(optimizer.state_dict())
        except TypeError as error:
            raise UserError(
                f"optimizer {name} has a state that no checkpoint holds: {error}; choose another"
            ) from error
        saved = unflatten_state({key: value.clone() for key, value in tensors.items()}, meta)
        copies = {group: nn.Parameter(p.detach().clone()) for group, p in params.items()}
        resumed = _build_groups(name, copies, settings, args)
        return _check_resume(name, (optimizer, params), (resumed, copies), saved)


def _check_signature(name: str) -> None:
    """Raises UserError for a class whose step needs a closure, or that takes no lr."""
    step = building.resolve_optimizer(name).step
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"optimizer {name} wants to compute the loss itself (step needs a closure), "
            "which this loop has none of; choose another"
        )
    known = building.optimizer_arguments(name)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    if "lr" not in known and not takes_any:
        raise UserError(
            f"optimizer {name} takes no lr, by which groups, stages and schedules steer it; "
            "choose another or give its class one"
        )


def _make_parameters(groups: Settings, device: torch.device) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for group in groups:
        found[group] = nn.Parameter(torch.randn(SHAPE, generator=generator).to(device))
    return found


def _build_groups(
    name: str, params: Parameters, settings: Settings, args: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer, in training mode."""
    groups = [{"params": [p], **settings[group]} for group, p in params.items()]
    optimizer = building.build_optimizer(name, building.split_by_ratio(groups, {}), args)
    if building.is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _check_groups(name: str, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Raises UserError for a class that changes the names or the number of its groups."""
    groups = optimizer.param_groups
    kept = [group["name"] for group in groups if {"name", "lr", "ratio"} <= group.keys()]
    if kept != list(settings) or len(kept) != len(groups):
        raise UserError(
            f"optimizer {name} arranges its groups anew, "
            "so that stages cannot steer them by name; choose another"
        )


def _run_steps(optimizer: torch.optim.Optimizer, params: Parameters) -> None:
    torch.manual_seed(0)  # inside fork_rng: for classes that round at random
    for _ in range(STEPS):
        # as at validations, of which one is before the first step
        with building.use_evaluation_parameters(optimizer):
            pass
        for p in params.values():
            p.grad = p.detach().clone()
        optimizer.step()


def _check_resume(
    name: str,
    run: tuple[torch.optim.Optimizer, Parameters],
    resumed: tuple[torch.optim.Optimizer, Parameters],
    saved: dict[str, Any],
) -> list[str]:
    """A sentence if a new optimizer does not go on from a saved state as the run does.

    The parameters of `resumed` are those of the time when the state was saved.
    """
    (optimizer, params), (again, copies) = run, resumed
    try:
        load_state(again, saved)
        _run_steps(again, copies)
    except Exception as error:  # of any type: the class may be a user's
        return [
            f"optimizer {name} cannot take up a state it saved ({_one_sentence(error)}), "
            "so that this run cannot be resumed"
        ]
    _run_steps(optimizer, params)
    ours, our_numbers = flatten_state(again.state_dict())
    theirs, their_numbers = flatten_state(optimizer.state_dict())
    same_state = our_numbers == their_numbers
    same_state = same_state and all(torch.equal(x, theirs[key]) for key, x in ours.items())
    if same_state and all(torch.equal(p, params[group]) for group, p in copies.items()):
        return []
    return [
        f"optimizer {name} does not go on from a saved state with the same bits, "
        "and neither will this run when it is resumed"
    ]


def _one_sentence(error: Exception) -> str:
    """The error's class and the first line of its text."""
    kind = type(error).__name__
    text = first_line(error)
    return kind if text == kind else f"{kind}: {text}"
