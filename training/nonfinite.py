"""Detection of NaN and infinity in losses, gradients, weights and latents; the errors name the
step, the parameter group or part of the model, and a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.config import Config
from lora_core.data.records import Record
from lora_core.diffusion import losses, noise
from lora_core.diffusion.prediction import scale_input
from lora_core.errors import UserError
from lora_core.plugins import function_name
from lora_core.runs.run_folder import Run, nonfinite_names
from lora_core.tensor_trees import tree_tensors
from training.inputs.step_inputs import StepInputs, TokenIds
from training.setup import Data, Model, Optimization
from training.skipped_steps import MAX_NONFINITE_IN_A_ROW, SkippedSteps

# Skipped steps in a row that end a run: each halves the loss scale, from 65536 to 0.002, and if
# gradients still overflow then, the activations do.
MAX_SKIPPED_IN_A_ROW = 25
LOWER_RATE = "lower the learning rate (--optimizer.lr)"


def count_skipped_steps(rows: Sequence[dict[str, Any]], skipped: SkippedSteps, data: Data) -> str:
    """Count the skipped steps in rows of the log, and print a line for the first ones; returns why
    the run ends, as a sentence, after too many in a row, else "".
    """
    reason = ""
    whats: dict[int, str] = {}  # step -> what is not finite
    records = [*data.training.records, *(data.class_images.records if data.class_images else ())]
    for row in rows:
        if what := skipped.count(row):
            whats[row["step"]] = what
            skipped.warn(row["step"], what, records)
        if reason:
            continue
        if skipped.overflows_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            reason = (
                f"the last {MAX_SKIPPED_IN_A_ROW} steps up to step {row['step']} were skipped, "
                "for their gradients overflow in fp16 at any loss scale; "
                "use --precision bf16 or fp32"
            )
        elif skipped.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW:
            reason = _describe_nonfinite_steps(row, what, skipped, records)
    if rows:
        skipped.forget_examples(rows[-1]["step"])
    return reason


def _describe_nonfinite_steps(
    row: Mapping[str, Any], what: str, skipped: SkippedSteps, records: Sequence[Record]
) -> str:
    """Why a run ends with this row: how many steps in a row were not finite, and their images."""
    last, count = row["step"], skipped.nonfinite_in_a_row
    found = skipped.describe_examples(range(last - count + 1, last + 1), records)
    images = "; ".join(f"step {step}: {words}" for step, words in found.items())
    steps = f"{count} steps in a row up to step {last} are skipped"
    if what == "loss":
        advice = f"{LOWER_RATE}, or look at the images"
        return f"the loss is {row['loss']}, and {steps} ({images}); {advice}"
    return (
        f"the gradient is {row['grad_norm']} in step {last}, whose loss is a number, "
        f"{row['loss']:g}, and {steps} ({images}); look for a place in the loss without a "
        f"derivative (a square root of 0, 0 / 0), or {LOWER_RATE}"
    )


def check_logged_values(
    rows: Sequence[Mapping[str, Any]],
    reason: str,
    inputs: Sequence[StepInputs],
    model: Model,
    config: Config,
    run: Run,
) -> None:
    """Raises UserError with the `reason` that count_skipped_steps gives, if any, and for a
    validation loss that is not finite. `inputs` are those of the newest step.
    """
    if reason:
        part = find_nonfinite_part(inputs, model, config) if reason.startswith("the loss") else ""
        raise UserError("; ".join(filter(None, (reason, part, last_checkpoint_note(run)))))
    for row in rows:
        if not math.isfinite(row.get("val_loss", 0.0)):
            reason = find_nonfinite_part(inputs, model, config) or (
                f"the network's output is not finite in {config.precision}; "
                "use --precision bf16 or fp32, or lower the learning rate"
            )
            loss = f"the validation loss is {row['val_loss']} after {row['step']} steps"
            raise UserError(f"{loss}: {reason}; {last_checkpoint_note(run)}")


def check_loss_values(
    rows: Tensor,
    loss: Callable[..., Tensor],
    inputs: Sequence[StepInputs],
    model: Model,
    config: Config,
) -> None:
    """Raises UserError for losses that are not one number per example, and for NaN and infinity
    that will not pass: in the run's first step, naming the part of the model that gives them or
    else the function `loss`, and later from damaged weights. Other such steps are skipped.
    """
    finite = not isinstance(rows, Tensor) or bool(rows.isfinite().all())
    is_first = inputs[0].number == 0
    sentence = ""
    if not finite:
        sentence = find_damaged_weights(model, config)
        if is_first:
            sentence = sentence or find_nonfinite_part(inputs, model, config)
    if sentence:
        raise UserError(sentence)
    losses.check_loss_shape(rows, loss, len(inputs[0].is_prior))
    if is_first:
        losses.check_loss_finite(rows, loss)
    if not rows.requires_grad:
        raise UserError(
            f"loss {function_name(loss)} returned numbers without a gradient, so that nothing "
            "would train; leave out detach() and torch.no_grad() on the way to them"
        )


def last_checkpoint_note(run: Run) -> str:
    """The newest checkpoint, as the last clause of an error message."""
    saved = run.newest_step()
    if saved is None:
        return "there is no checkpoint"
    return f"the last good checkpoint is that of step {saved}"


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
        state = tree_tensors([own, shared])
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
    """Raises UserError where every step of the run was skipped."""
    if skipped.total < steps:
        return
    why, advice = "their loss or gradient is not finite", f"{LOWER_RATE}, or look at the images"
    if skipped.overflows:
        why, advice = "their gradients overflow in fp16", "use --precision bf16 or fp32"
    raise UserError(f"all {steps} steps were skipped, for {why}, so nothing was learned; {advice}")


@torch.no_grad()
def find_nonfinite_part(inputs: Sequence[StepInputs], model: Model, config: Config) -> str:
    """A sentence that names the first part of the model with NaN or infinity and a remedy; "" where
    none is found. Slow, with forward passes of each part: for a run that is about to fail.
    """
    family, cure = model.family, _cure(config)
    if damaged := find_damaged_weights(model, config):
        return damaged
    if config.shard:  # a forward pass needs all processes, and this one may be the only one here
        return ""
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


def find_damaged_weights(model: Model, config: Config) -> str:
    """A sentence that names the first weight with NaN or infinity and a remedy; "" for none."""
    for name, module in model.family.modules.items():
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if bad := nonfinite_names(weights):
            return (
                f"{name} has NaN or infinity among its weights, first in {bad[0]}; {_cure(config)}"
            )
    return ""


def _cure(config: Config) -> str:
    return (
        "fetch the model again, or use --precision bf16 or fp32 "
        f"(this run is in {config.precision})"
    )


def _parameter_path(model: Model, parameter: Tensor) -> str:
    """A trainable parameter's path in the model, as `" (PATH)"` for error messages."""
    for name, module in model.family.modules.items():
        for path, other in module.named_parameters():
            if other is parameter:
                return f" ({name}.{path})"
    return ""
