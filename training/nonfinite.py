"""Detection of NaN and infinity in losses, gradients, weights and latents; the errors name the
step, the parameter group or part of the model, and a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.config import Config
from lora_core.diffusion import losses, noise
from lora_core.diffusion.prediction import scale_input
from lora_core.errors import UserError
from lora_core.plugins import function_name
from lora_core.runs.run_folder import Run, nonfinite_names
from training import cuda_graph
from training.setup import Model, Optimization
from training.step_inputs import StepInputs, TokenIds

# Skipped steps in a row that end a run: each halves the loss scale, from 65536 to 0.002, and if
# gradients still overflow then, the activations do.
MAX_SKIPPED_IN_A_ROW = 25
LOWER_RATE = "lower the learning rate (--optimizer.lr)"


@dataclass
class SkippedSteps:
    """Counter of steps that were skipped because their gradients overflowed in fp16."""

    total: int = 0
    in_a_row: int = 0  # up to the last row of the log

    def count(self, total: int) -> None:
        """Update the counts with the total after one more step."""
        self.in_a_row = self.in_a_row + 1 if total > self.total else 0
        self.total = total


def check_logged_values(
    rows: Sequence[Mapping[str, Any]],
    skipped: SkippedSteps,
    inputs: Sequence[StepInputs],
    model: Model,
    config: Config,
    run: Run,
) -> None:
    """Raises UserError for the first row of the log with a loss or a gradient that is NaN or
    infinite, and for too many skipped steps in a row. `inputs` are those of the newest step.

    In fp16 a step whose gradient overflows is skipped; occasional skipped steps are normal.
    """
    for row in rows:
        if "skipped" in row:
            skipped.count(row["skipped"])
        if skipped.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the last {MAX_SKIPPED_IN_A_ROW} steps up to step {row['step']} were skipped, "
                "for their gradients overflow in fp16 at any loss scale; "
                f"use --precision bf16 or fp32; {last_checkpoint_note(run)}"
            )
        values = {name: row.get(name, 0.0) for name in ("loss", "grad_norm", "val_loss")}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad == ["val_loss"]:
            reason = find_nonfinite_part(inputs, model, config) or (
                f"the network's output is not finite in {config.precision}; "
                "use --precision bf16 or fp32, or lower the learning rate"
            )
            loss = f"the validation loss is {row['val_loss']} after {row['step']} steps"
            raise UserError(f"{loss}: {reason}; {last_checkpoint_note(run)}")
        if bad and config.precision != "fp16":
            sentence = _describe_nonfinite_row(row, bad[0], model)
            raise UserError(f"{sentence}; {last_checkpoint_note(run)}")


def check_loss_values(
    rows: Tensor,
    loss: Callable[..., Tensor],
    inputs: Sequence[StepInputs],
    model: Model,
    config: Config,
) -> None:
    """Raises UserError for losses that are not one finite number per example, naming the part of
    the model that gives NaN, or else the function `loss` that returned them.
    """
    finite = not isinstance(rows, Tensor) or bool(rows.isfinite().all())
    sentence = "" if finite else find_nonfinite_part(inputs, model, config)
    if sentence:
        raise UserError(sentence)
    losses.check_loss_shape(rows, loss, len(inputs[0].is_prior))
    losses.check_loss_finite(rows, loss)
    if not rows.requires_grad:
        raise UserError(
            f"loss {function_name(loss)} returned numbers without a gradient, so that nothing "
            "would train; leave out detach() and torch.no_grad() on the way to them"
        )


def _describe_nonfinite_row(row: Mapping[str, Any], what: str, model: Model) -> str:
    if what == "loss":
        return f"the loss is {row['loss']} since step {row['step']}; {LOWER_RATE}"
    damaged = []
    for name, params in model.groups.items():
        if nonfinite_names(dict(enumerate(params))):
            damaged.append(name)
    hit = f", and {' and '.join(damaged)} took it over" if damaged else ""
    return (
        f"the gradient is {row['grad_norm']} in step {row['step']}, "
        f"whose loss is a number, {row['loss']:g}{hit}; look for a place in the loss "
        f"without a derivative (a square root of 0, 0 / 0), or {LOWER_RATE}"
    )


def last_checkpoint_note(run: Run) -> str:
    """The newest checkpoint, as the last clause of an error message."""
    saved = run.newest_step()
    if saved is None:
        return "there is no checkpoint"
    return f"the last checkpoint, of step {saved}, is from before"


@torch.no_grad()
def check_finite_state(model: Model, optimization: Optimization, done: int, run: Run) -> None:
    """Raises UserError where a parameter, the optimizer's state or the moving average holds NaN or
    infinity after `done` steps. Waits for the device once.
    """
    parts: dict[str, Sequence[Tensor]] = dict(model.groups)
    optimizer = optimization.optimizer
    for group in optimizer.param_groups:
        own = [optimizer.state.get(p, {}) for p in group["params"]]
        shared = {key: value for key, value in group.items() if key != "params"}
        state = cuda_graph.tree_tensors([own, shared])
        parts[f"the optimizer's state of {group['name']}"] = state
    if optimization.average is not None:
        parts["the moving average"] = optimization.average.averages
    every: dict[tuple[str, int], Tensor] = {}
    for part, tensors in parts.items():
        every |= {(part, i): tensor for i, tensor in enumerate(tensors)}
    bad = nonfinite_names(every)
    if not bad:
        return
    part, i = bad[0]
    where = _parameter_path(model, parts[part][i]) if part in model.groups else ""
    damage = f"{part}{where} holds NaN or infinity"
    if not done:
        advice = "look at the adapter's or the tokens' initial values"
        raise UserError(f"{damage} before the first step; {advice}")
    raise UserError(
        f"{damage} after step {done}, and nothing of it is written; {LOWER_RATE}; "
        f"{last_checkpoint_note(run)}"
    )


def check_steps_taken(skipped: SkippedSteps, steps: int) -> None:
    """Raises UserError where every step of the run was skipped: all overflowed in fp16."""
    if skipped.total >= steps:
        raise UserError(
            f"all {steps} steps were skipped, for their gradients overflow in fp16, "
            "so nothing was learned; use --precision bf16 or fp32"
        )


@torch.no_grad()
def find_nonfinite_part(inputs: Sequence[StepInputs], model: Model, config: Config) -> str:
    """A sentence that names the first part of the model with NaN or infinity and a remedy; "" where
    none is found. Slow, with forward passes of each part: for a run that is about to fail.
    """
    family = model.family
    cure = (
        "fetch the model again, or use --precision bf16 or fp32 "
        f"(this run is in {config.precision})"
    )
    for name, module in family.modules.items():
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if bad := nonfinite_names(weights):
            return f"{name} has NaN or infinity among its weights, first in {bad[0]}; {cure}"
    for x in inputs:
        if nonfinite_names({"x0": x.x0}):
            return (
                "the VAE's latents of the images are not finite; "
                "leave --vae-precision at fp32 or give another --vae"
            )
        cond = x.text
        if isinstance(cond, TokenIds):
            with model.autocast:
                cond = family.encode(cond.ids)
        if nonfinite_names({"prompt": cond.prompt_embeds, **cond.extra}):
            return f"the text encoder's output is not finite, though its weights are; {cure}"
        cond = family.add_size_embeddings(cond, x.sizes, model.guidance)
        x_t = noise.add_noise(x.x0, x.eps_in, x.level)
        with model.autocast:
            scaled = scale_input(family.prediction, x_t, x.level)
            out = family.denoise(scaled, x.level, cond, x.inpaint)
        if nonfinite_names({"out": out}):
            return f"the output of {family.denoiser} is not finite, though its weights are; {cure}"
    return ""


def _parameter_path(model: Model, parameter: Tensor) -> str:
    """A trainable parameter's path in the model, as `" (PATH)"` for error messages."""
    for name, module in model.family.modules.items():
        for path, other in module.named_parameters():
            if other is parameter:
                return f" ({name}.{path})"
    return ""
