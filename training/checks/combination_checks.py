"""Checks of options that do not act together with some others."""

from __future__ import annotations

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.optim import building


def check_combinations(c: Config) -> None:
    """Raises UserError for options that cannot act as they say together with others: losses on
    attention, pairs, a limit of the updates' norms, an adaptive noise offset.
    """
    _check_attention(c)
    _check_pairs(c)
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


def _check_attention(c: Config) -> None:
    """Raises UserError for a loss on the attention of learned tokens without tokens or masks."""
    if c.loss not in ("attention", "edlora"):
        return
    if not c.trains("tokens") or not c.masks_loss:
        raise UserError(
            f"--loss {c.loss} compares the attention on learned tokens with masks; add a stage of "
            "tokens and --data.masks (with --data.mask-use loss or both), or choose --loss mse"
        )
    if c.mask_scale != "mean":
        raise UserError(
            f"--mask-scale {c.mask_scale} would scale the attention in --loss {c.loss} as well; "
            "leave it out (edlora has Mix-of-Show's scale of the masked loss)"
        )


def _check_pairs(c: Config) -> None:
    """Raises UserError for options that have no meaning with pairs of images."""
    if not c.data.pairs:
        return
    if c.data.dataset:
        raise UserError(
            f"--data.pairs {c.data.pairs} pairs the images of a folder, not those of "
            "--data.dataset; write the images and a metadata.jsonl with the two file names into a "
            "folder, and give that with --data.images"
        )
    if c.prior.prompt:
        raise UserError(
            "--prior.prompt adds class images, of which none is preferred to another, to the "
            "pairs of --data.pairs; leave out one of the two"
        )
    if c.data.masks != "none":
        raise UserError(
            f"--data.masks {c.data.masks} has no meaning with --data.pairs, whose images have two "
            "masks; leave out one of the two"
        )
