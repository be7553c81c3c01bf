"""Checks of options that do not act together with some others."""

from __future__ import annotations

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.optim import building


def check_combinations(c: Config) -> None:
    """Raises UserError for a limit of the updates' norms, or an adaptive noise offset, that cannot
    act as it says together with the config's other options.
    """
    if c.optimizer.max_update_norm:
        _check_update_norm(c)
    if c.noise.adaptive_offset:
        _check_adaptive_offset(c)


def _check_update_norm(c: Config) -> None:
    """Raises UserError for a limit of the updates' norms where their factors cannot be scaled."""
    flag = f"--optimizer.max-update-norm {c.optimizer.max_update_norm:g}"
    if c.adapter.kind != "lora":
        raise UserError(
            f"{flag} limits alpha / rank * up @ down, which --adapter.kind {c.adapter.kind} does "
            "not add by itself; use --adapter.kind lora or leave it out"
        )
    if building.is_schedule_free(building.resolve_optimizer(c.optimizer.name)):
        raise UserError(
            f"{flag} scales the parameters, of which {c.optimizer.name} keeps further copies; "
            "choose another optimizer or leave it out"
        )


def _check_adaptive_offset(c: Config) -> None:
    """Raises UserError for an adaptive offset of pairs, whose noise would differ."""
    if c.data.pairs:
        raise UserError(
            f"--noise.adaptive-offset {c.noise.adaptive_offset:g} gives each image noise of its "
            "own, and the two images of --data.pairs need the same; leave out one of the two"
        )
