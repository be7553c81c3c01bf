"""Options that lower the memory of a run, from the least costly on, and those that fit a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

from lora_core.config import Config
from lora_core.errors import UserError
from training.checks import config_checks
from training.memory.memory_plan import MemoryPlan, plan_memory


class Saving(NamedTuple):
    """An option that lowers the memory."""

    words: tuple[str, ...]  # on the command line
    change: Callable[[Config], Config]


class Fit(NamedTuple):
    """Options with which a run fits."""

    words: tuple[str, ...]  # on the command line; () as it is configured
    plan: MemoryPlan


def possible_savings(config: Config) -> list[Saving]:
    """The options that change this config and lower its memory, the least costly first: those
    that cost no quality before those that do, and those that cost little time before others.
    """
    found = []
    for words, changes in _changes(config):
        flags = tuple(words.split())
        found.append(Saving(flags, _changer(changes)))
    return found


def _changer(changes: dict[str, Any]) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        values = dict(changes)
        side = values.pop("resolution", 0)
        if side:
            values["data"] = replace(config.data, resolution=side)
        return replace(config, **values)

    return change


def _changes(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """(words of the flag, fields and their values), from the least costly on."""
    trains_text = config.trains("text_encoder", "tokens")
    if not config.offload:
        yield "--offload", {"offload": True}
    if config.precision in ("fp32", "fp64"):
        yield "--precision bf16", {"precision": "bf16"}
    if config.gradient_checkpointing == "none":
        yield "--gradient-checkpointing blocks", {"gradient_checkpointing": "blocks"}
    if config.gradient_checkpointing != "all" and trains_text:
        yield "--gradient-checkpointing all", {"gradient_checkpointing": "all"}
    if config.batch_size > 1:
        steps = config.batch_size * config.accumulation
        yield f"--batch-size 1 --accumulation {steps}", {"batch_size": 1, "accumulation": steps}
    if config.vae_precision == "fp32":
        yield "--vae-precision bf16", {"vae_precision": "bf16"}
    if config.quantize == "none" and config.precision != "fp64":
        yield "--quantize fp8", {"quantize": "fp8"}
    if not config.stream and not config.shard:
        yield "--stream", {"stream": True}
    if config.quantize != "int4" and config.precision != "fp64":
        yield "--quantize int4", {"quantize": "int4"}
    for share in (0.75, 0.5):
        side = int(share * config.data.resolution) // 64 * 64
        if side >= 256:
            yield f"--data.resolution {side}", {"resolution": side}


def find_fit(
    config: Config, functions: Any, limit: float, *, without: Sequence[tuple[str, ...]] = ()
) -> Fit | MemoryPlan:
    """The options with which a run needs at most `limit` bytes; where none suffice the plan with
    the least memory. Options are added in their order, and those that are not needed taken out
    again, the costliest first. `without`: words of options that are not considered.
    """
    plan = plan_memory(config, functions)
    if plan.peak.total <= limit:
        return Fit((), plan)
    savings = [own for own in possible_savings(config) if own.words not in without]
    best, chosen = plan, list[Saving]()
    for saving in savings:
        trial = [*_apart_from(chosen, saving), saving]
        found = _plan_with(config, functions, trial)
        if found is None or found.peak.total > best.peak.total:
            continue
        best, chosen = found, trial
        if found.peak.total <= limit:
            break
    if best.peak.total > limit:
        return best
    for saving in reversed(chosen[:-1]):
        if saving.words[0] == "--quantize" and any(own.words[0] == "--stream" for own in chosen):
            continue  # of a smaller form there is less to copy
        fewer = [own for own in chosen if own is not saving]
        found = _plan_with(config, functions, fewer)
        if found is not None and found.peak.total <= limit:
            best, chosen = found, fewer
    words = chain.from_iterable(saving.words for saving in chosen)
    return Fit(tuple(words), best)


def _apart_from(chosen: Sequence[Saving], saving: Saving) -> list[Saving]:
    """The chosen savings without an earlier value of the same option."""
    return [own for own in chosen if own.words[0] != saving.words[0]]


def _plan_with(config: Config, functions: Any, savings: Sequence[Saving]) -> MemoryPlan | None:
    """The plan with these options; None where they do not go together, or with the model."""
    for saving in savings:
        config = saving.change(config)
    try:
        installed = find_spec("torchao") is not None  # without it --quantize says what to install
        checked = config if installed else replace(config, quantize="none")
        config_checks.check_config(checked, needs_images=False)
        return plan_memory(config, functions)
    except UserError:
        return None
