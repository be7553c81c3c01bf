"""Check of a loss or a step for pairs of images, one of which is preferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.plugins import function_name


def check_reads_pairs(c: Config, loss: Callable[..., Any], step: Callable[..., Any] | None) -> None:
    """Raises UserError for pairs without a loss or step that compares their images, and for such a
    loss or step without pairs. `step` is the caller's own, if there is one.
    """
    functions = (loss,) if step is None else (loss, step)
    readers = [function for function in functions if getattr(function, "reads_pairs", False)]
    if c.data.pairs and not readers:
        name = function_name(loss)
        raise UserError(
            f"--data.pairs {c.data.pairs} gives pairs of images, and the loss {name} treats "
            "winners and losers alike; take one that compares them, such as --loss "
            f"examples/diffusion_dpo.py:diffusion_dpo, or say that it does: {name}.reads_pairs = "
            "True"
        )
    if readers and not c.data.pairs:
        raise UserError(
            f"{function_name(readers[0])} compares the two images of pairs, and there are none; "
            "give the folder with the losers, or two columns of metadata.jsonl, with --data.pairs"
        )
