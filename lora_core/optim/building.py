"""Optimizers by name: finding the class, its parameter groups and settings, and building it."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import UserError
from lora_core.optim.adamw import AdamW
from lora_core.plugins import check_arguments, find_plugin
from lora_core.prodigy import Prodigy
from lora_core.text import suggest_name, unknown_name

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "prodigy": Prodigy}
# Optimizer -> group -> learning rate: cloneofsimo's lora_pti; arXiv 2306.06101.
DEFAULT_RATES = {
    "adamw": {"denoiser": 1e-4, "text_encoder": 1e-5, "tokens": 5e-4},
    "prodigy": {"denoiser": 1.0, "text_encoder": 1.0, "tokens": 1.0},
}
DEFAULT_WEIGHT_DECAYS = {"denoiser": 0.01, "text_encoder": 0.01, "tokens": 0.0}
OWN_OPTIONS = ("params", "lr", "weight_decay", "betas")  # not settable with --optimizer.args


# ---------------------------------------------------------------- the class


def resolve_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of a name.

    `name` is a key of OPTIMIZERS, a dotted path such as "torch.optim.Adagrad", or
    "path/to/file.py:Class". Raises UserError if there is no such class.
    """
    path, dot, attribute = name.rpartition(".")
    if name in OPTIMIZERS or ":" in name:
        return _check_class(find_plugin(name, OPTIMIZERS, "optimizer", noun="class"), name)
    if not (path and dot):
        sentence = unknown_name(name, OPTIMIZERS, "optimizer", "Class")
        raise UserError(f"{sentence}, or a dotted class path such as torch.optim.Adagrad")
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"optimizer {name!r}: module {path!r} cannot be imported ({error}); "
            "install it or correct the path"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(
            f"optimizer {name!r}: module {path!r} has no {attribute!r}; "
            f"name a class in it{suggest_name(attribute, dir(module))}"
        )
    return _check_class(found, name)


def _check_class(found: Any, name: str) -> type[torch.optim.Optimizer]:
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(
            f"optimizer {name!r} is {found!r}, not a torch.optim.Optimizer class; "
            "name the class itself"
        )
    return found


def optimizer_arguments(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that the class of an optimizer takes."""
    return _class_arguments(resolve_optimizer(name))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=64)
def _class_arguments(cls: type[torch.optim.Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


# ---------------------------------------------------------------- parameter groups


def default_rates(name: str, groups: Iterable[str]) -> dict[str, float]:
    """The default learning rate of each group: from DEFAULT_RATES, else the class's default.

    Raises UserError where there is neither.
    """
    own, names = _default_rate(name), list(groups)
    if own is None and names and name not in DEFAULT_RATES:
        rates = " ".join(f"{group}=1e-4" for group in names)
        raise UserError(
            f"optimizer {name} has no learning rate of its own; "
            f"give --optimizer.lr, such as {rates}"
        )
    known = DEFAULT_RATES.get(name, {})
    return {group: known.get(group, own) for group in names}  # type: ignore[misc]


def _default_rate(name: str) -> float | None:
    """The default lr of a class, or None."""
    argument = optimizer_arguments(name).get("lr")
    own = None if argument is None else argument.default
    return float(own) if isinstance(own, float | int) else None


def group_settings(
    name: str,
    groups: Iterable[str],
    *,
    lr: Mapping[str, float],
    decay: Mapping[str, float],
    betas: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """Group -> its settings: name and lr, and weight_decay and betas where these are given.

    Learning rates that are not given come from `default_rates`, weight decays from
    DEFAULT_WEIGHT_DECAYS; a class without weight decay gets none if none is given.
    """
    names = list(groups)
    rates = default_rates(name, [group for group in names if group not in lr]) | dict(lr)
    decays = bool(decay) or "weight_decay" in optimizer_arguments(name)
    settings: dict[str, dict[str, Any]] = {}
    for group in names:
        settings[group] = {"name": group, "lr": rates[group]}
        if decays:
            settings[group]["weight_decay"] = decay.get(group, DEFAULT_WEIGHT_DECAYS[group])
        if group in betas:
            settings[group]["betas"] = tuple(betas[group])
    return settings


def split_by_ratio(
    groups: Iterable[Mapping[str, Any]], ratios: Mapping[str, Mapping[Tensor, float]]
) -> list[dict[str, Any]]:
    """Parameter groups split by learning rate: one group of the same name for every ratio in it.

    `ratios`: group -> parameter -> its learning rate relative to the group's, as in LoRA+ (arXiv
    2402.12354). Each group has "ratio" (1.0 for parameters without one, which come first), so that
    a schedule may set lr = rate * factor * group["ratio"] later. `groups` have "name", "params" and
    "lr". Raises ValueError for a parameter that is not in its group.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        own = {id(p): float(ratio) for p, ratio in ratios.get(group["name"], {}).items()}
        parts: dict[float, list[Any]] = {1.0: []}
        for p in group["params"]:
            parts.setdefault(own.pop(id(p), 1.0), []).append(p)
        if own:
            raise ValueError(f"{group['name']} lacks {len(own)} of its parameters with a ratio")
        for ratio, params in parts.items():
            if params:
                lr = group["lr"] * ratio
                found.append({**group, "params": params, "lr": lr, "ratio": ratio})
    return found


def build_optimizer(
    name: str, groups: list[dict[str, Any]], args: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer over named parameter groups, with further arguments of its class.

    Raises UserError for arguments that the class does not take or refuses.
    """
    for option in ("weight_decay", "betas"):
        if option not in optimizer_arguments(name) and any(option in group for group in groups):
            flag = f"--optimizer.{option.replace('_', '-')}"
            raise UserError(f"{name} takes no {option}; leave {flag} out")
    check_arguments(resolve_optimizer(name), args, f"optimizer {name}", given=OWN_OPTIONS)
    rate = {}
    if "lr" in optimizer_arguments(name) and _default_rate(name) is None:
        rate["lr"] = groups[0]["lr"]  # a class may require one; the groups have their own
    try:
        return resolve_optimizer(name)(groups, **rate, **args)
    except Exception as error:  # of any type: the class may be a user's
        given = " ".join(f"{key}={value!r}" for key, value in args.items())
        settings = f" (--optimizer.args are {given})" if given else ""
        raise UserError(f"{name} refuses its settings: {error}{settings}") from None


# ---------------------------------------------------------------- schedule-free


@contextmanager
def use_evaluation_parameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block a schedule-free optimizer's parameters are those for evaluation.

    Such an optimizer (arXiv 2405.15682) trains at one point and evaluates at another; its methods
    train() and eval() move the parameters between them, with rounding. They are restored bit for
    bit, so that evaluating a model does not change its training. Any other optimizer's parameters
    are not changed.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    params: list[Tensor] = []
    for group in optimizer.param_groups:
        params += group["params"]
    trained = [p.detach().clone() for p in params]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, before in zip(params, trained):
                p.copy_(before)


def is_schedule_free(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer or its class has train() and eval(), as in the package schedulefree."""
    methods = [getattr(optimizer, name, None) for name in ("train", "eval")]
    return all(map(callable, methods))
