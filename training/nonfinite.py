"""Losses, gradients, weights and latents that are NaN or infinite: in which step, which group,
which part of the model, and what to do. Functions of an open Session.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.diffusion import losses, noise
from lora_core.errors import UserError
from lora_core.runs.run_folder import nonfinite_names
from models import Conditioning
from training import cuda_graph

if TYPE_CHECKING:
    from training.setup import Session

# Skipped steps in a row that end a run: each halves the loss scale, from 65536 to 0.002, and a
# gradient that still overflows comes of activations.
MAX_SKIPPED_IN_A_ROW = 25


def check_logged_values(s: Session, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for the first row of the log with a loss or a gradient that is NaN or
    infinite, and for too many skipped steps in a row.

    In fp16 a step whose gradient overflows is skipped, which is no fault as long as it happens now
    and then.
    """
    for row in rows:
        count, streak = s.skips
        if "skipped" in row:
            s.skips = (row["skipped"], streak + 1 if row["skipped"] > count else 0)
        if s.skips[1] >= MAX_SKIPPED_IN_A_ROW:
            skipped = f"the last {MAX_SKIPPED_IN_A_ROW} steps up to step {row['step']} were skipped, for their gradients overflow in fp16 at any loss scale"
            raise UserError(f"{skipped}; use --precision bf16 or fp32; {last_checkpoint_note(s)}")
        bad = [
            name
            for name in ("loss", "grad_norm", "val_loss")
            if not math.isfinite(row.get(name, 0.0))
        ]
        if bad == ["val_loss"]:
            overflow = f"the network's output is no number in {s.config.precision}"
            reason = (
                find_nonfinite_part(s)
                or f"{overflow}; use --precision bf16 or fp32, or lower the learning rate"
            )
            raise UserError(
                f"the validation loss is {row['val_loss']} after {row['step']} steps: {reason}; {last_checkpoint_note(s)}"
            )
        if bad and s.scaler is None:
            raise UserError(_nonfinite_sentence(s, row, bad[0]))


def check_loss_values(s: Session, rows: Tensor, name: str, b: int) -> None:
    """Refuses loss rows that are not one finite number per example; where the model is to blame,
    not the loss, it is named.
    """
    if (
        isinstance(rows, Tensor)
        and not bool(rows.isfinite().all())
        and (sentence := find_nonfinite_part(s))
    ):
        raise UserError(sentence)
    losses.check_loss_shape(rows, name, b)
    losses.check_loss_finite(rows, name)


def _nonfinite_sentence(s: Session, row: Mapping[str, Any], what: str) -> str:
    if what == "loss":
        return f"the loss is {row['loss']} since step {row['step']}; lower the learning rate (--optimizer.lr); {last_checkpoint_note(s)}"
    damaged = [
        name for name, params in s.groups.items() if nonfinite_names(dict(enumerate(params)))
    ]
    hit = f", and {' and '.join(damaged)} took it over" if damaged else ""
    return (
        f"the gradient is {row['grad_norm']} in step {row['step']}, whose loss is a number, {row['loss']:g}{hit}; "
        f"look for a place in the loss without a derivative (a square root of 0, 0 / 0), or lower the learning rate (--optimizer.lr); {last_checkpoint_note(s)}"
    )


def last_checkpoint_note(s: Session) -> str:
    """Which checkpoint there is to go back to."""
    return (
        "there is no checkpoint"
        if s.saved is None
        else f"the last checkpoint, of step {s.saved}, is from before"
    )


@torch.no_grad()
def check_finite_state(s: Session, done: int) -> None:
    """Raises UserError where a parameter, the optimiser's state or the moving average holds NaN or
    infinity. Waits for the device once.
    """
    parts: dict[str, dict[int, Tensor]] = {
        name: dict(enumerate(params)) for name, params in s.groups.items()
    }
    for group in s.optimizer.param_groups:
        own = [s.optimizer.state.get(p, {}) for p in group["params"]]
        shared = {key: value for key, value in group.items() if key != "params"}
        parts[f"the optimizer's state of {group['name']}"] = dict(
            enumerate(cuda_graph.tree_tensors([own, shared]))
        )
    parts["the moving average"] = dict(
        enumerate(s.average.averages if s.average is not None else ())
    )
    every = {(part, i): tensor for part, tensors in parts.items() for i, tensor in tensors.items()}
    bad = nonfinite_names(every)
    if bad:
        part, i = bad[0]
        where = _parameter_path(s, parts[part][i]) if part in s.groups else ""
        if not done:
            raise UserError(
                f"{part}{where} holds NaN or infinity before the first step; look at the adapter's or the tokens' initial values"
            )
        raise UserError(
            f"{part}{where} holds NaN or infinity after step {done}, and nothing of it is written; "
            f"lower the learning rate (--optimizer.lr); {last_checkpoint_note(s)}"
        )


def check_steps_taken(s: Session) -> None:
    """Raises UserError where no step of the run changed anything: all of them overflowed in fp16."""
    if s.scaler is not None and s.skips[0] >= s.config.steps:
        raise UserError(
            f"all {s.config.steps} steps were skipped, for their gradients overflow in fp16, so nothing was learned; use --precision bf16 or fp32"
        )


@torch.no_grad()
def find_nonfinite_part(s: Session) -> str:
    """The part of the model that gives NaN or infinity, as a sentence with what to do; "" where
    none is found. Looks at everything, for a run that ends here.
    """
    cure = f"fetch the model again, or use --precision bf16 or fp32 (this run is in {s.config.precision})"
    for name, module in s.family.modules.items():
        if bad := nonfinite_names(
            {**dict(module.named_parameters()), **dict(module.named_buffers())}
        ):
            return f"{name} has NaN or infinity among its weights, first in {bad[0]}; {cure}"
    for x in s.drawn.values():
        if nonfinite_names({"x0": x.x0}):
            return "the VAE's latents of the images are no numbers; leave --vae-precision at fp32 or give another --vae"
        cond = x.text if isinstance(x.text, Conditioning) else s.conditioning(x.text, x.sizes)
        if nonfinite_names({"prompt": cond.prompt_embeds, **cond.extra}):
            return f"the text encoder's output is no number, though its weights are; {cure}"
        cond = s.family.add_size_embeddings(cond, x.sizes, s.config.noise.guidance)
        if nonfinite_names(
            {"out": s.denoise(noise.add_noise(x.x0, x.eps_in, x.level), x.level, cond, x.inpaint)}
        ):
            return f"the output of {s.family.denoiser} is no number, though its weights are; {cure}"
    return ""


def _parameter_path(s: Session, parameter: Tensor) -> str:
    """` (its path in the model)`, of a parameter that trains."""
    for name, module in s.family.modules.items():
        for path, other in module.named_parameters():
            if other is parameter:
                return f" ({name}.{path})"
    return ""
