"""The networks' forward passes in a training step, and the optimizer step over the micro-batches of
a batch. train.training_step gives their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lora_core import distributed, tokens
from lora_core.adapters import injection
from lora_core.adapters.norm_limits import limit_update_norms_
from lora_core.config import Config, Stage
from lora_core.cross_attention import AttentionMap
from lora_core.diffusion import losses
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import NoiseLevel
from lora_core.diffusion.prediction import scale_input
from lora_core.diffusion.step_output import Readings, add_reading
from lora_core.errors import UserError
from lora_core.family import Conditioning, Sizes
from lora_core.layer_prompts import arrange_by_layer
from lora_core.optim import gradients
from lora_core.plugins import explain_errors
from lora_core.prodigy import read_distance
from training import nonfinite
from training.inputs.step_inputs import StepInputs, TokenIds
from training.setup import Model, Optimization

Loss = Callable[[StepOutput], Tensor]  # -> [b]
Step = Callable[[Model, StepInputs, Config, Loss], Tensor]  # -> [b]


@dataclass(frozen=True)
class StepFunctions:
    """The step function of a run, and the loss that it is called with."""

    step: Step
    loss: Loss
    own_step: Step | None = None  # equal to `step` where that is not train.training_step

    @property
    def reads_attention(self) -> bool:
        """Whether the loss or the step reads attention maps and token places."""
        functions = (self.loss, self.step)
        return any(getattr(function, "reads_attention", False) for function in functions)

    @property
    def weights_itself(self) -> bool:
        """Whether the loss is not weighted by noise level, as it declares."""
        return getattr(self.loss, "weighting", None) == "none"


class StepResult(NamedTuple):
    """Loss, gradient norm and logged values of one step of the optimizer."""

    loss: Tensor  # []
    norm: Tensor  # [] of the gradient before clipping
    readings: dict[str, Tensor]  # values that the loss logged, by name


# ---------------------------------------------------------------- the networks' forward passes


def encode_conditioning(model: Model, text: Conditioning | TokenIds, sizes: Sizes) -> Conditioning:
    """The denoiser's conditioning: encoded captions and image sizes."""
    family = model.family
    if isinstance(text, TokenIds):
        with model.autocast:
            cond = family.encode(text.ids)
        if text.layers is not None:
            cond = arrange_by_layer(cond, text.layers)
        if text.kept is not None:
            cond = cond.zeroed(family.zeros, text.kept)
    else:
        cond = text
    return family.add_size_embeddings(cond, sizes, model.guidance)


def denoise(
    model: Model,
    x_t: Tensor,
    level: NoiseLevel,
    cond: Conditioning,
    inpaint: Tensor | None,
    maps: list[AttentionMap] | None = None,
) -> Tensor:
    """The denoiser's raw output [b, c, h, w] for x_t; its attention maps are appended to `maps`."""
    scaled = scale_input(model.family.prediction, x_t, level)
    with model.autocast:
        return model.family.denoise(scaled, level, cond, inpaint, maps)


def lazy_members(
    model: Model, x: StepInputs, x_t: Tensor, cond: Conditioning, maps: list[AttentionMap] | None
) -> dict[str, Callable[..., Any]]:
    """Members of StepOutput that are computed when a loss reads them, most with another forward
    pass; and the attention maps, if the forward pass recorded any.
    """

    def out_at(level: NoiseLevel, other: Tensor) -> Tensor:
        return denoise(model, other, level, cond, x.inpaint)

    @torch.no_grad()
    def base_out_at(level: NoiseLevel, other: Tensor) -> Tensor:
        with injection.disable_adapters(model.denoiser):
            return denoise(model, other, level, cond, x.inpaint)

    @torch.no_grad()
    def base_out(other: Conditioning = cond) -> Tensor:
        with injection.disable_adapters(model.denoiser):
            return denoise(model, x_t, x.level, other, x.inpaint)

    def plain_base_out() -> Tensor:
        assert x.plain is not None
        return base_out(encode_conditioning(model, x.plain, x.sizes))

    def preserved() -> tuple[Tensor, Tensor]:
        assert x.swapped is not None
        ours, base = (encode_conditioning(model, text, x.sizes) for text in x.swapped)
        return denoise(model, x_t, x.level, ours, x.inpaint), base_out(base)

    members: dict[str, Callable[..., Any]] = {
        "base_out": base_out,
        "out_at": out_at,
        "base_out_at": base_out_at,
        "preserved": preserved,
    }
    if x.plain is not None:
        members["plain_base_out"] = plain_base_out
    if maps is not None:
        members["attention"] = lambda: maps
    return {**members, "decode": model.family.decode}


# ---------------------------------------------------------------- the optimizer step


def optimizer_step(
    functions: StepFunctions,
    stage: Stage,
    config: Config,
    model: Model,
    optimization: Optimization,
    check: bool,
    inputs: Sequence[StepInputs],
) -> StepResult:
    """One step over the micro-batches. A CUDA graph captures this function. With `check`, which
    waits for the device, raises UserError for losses that are not finite and for groups without a
    gradient.
    """
    optimization.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=model.device)
    readings: Readings = {}
    with ExitStack() as stack:
        # no adapter changes before the optimizer's step
        networks = model.residency.networks_there(model.with_dora) if model.with_dora else ()
        for network in networks:
            stack.enter_context(injection.cache_dora_norms(network))
        for x in inputs:
            if x.dropout_keys is not None:
                set_step_dropout_keys(model.adapted, x.dropout_keys, x.step)
            try:
                rows = functions.step(model, replace(x, readings=readings), config, functions.loss)
            except Exception as error:
                raise_explained(error, functions, config)
            if check:
                returned_by = functions.own_step or functions.loss
                nonfinite.check_loss_values(rows, returned_by, inputs, model, config)
            loss = losses.sum_losses(
                rows, x.is_prior, prior_weight=config.prior.weight, instances=optimization.images
            )
            scaler = optimization.scaler
            (loss if scaler is None else scaler.scale(loss)).backward()
            total = total + loss.detach()
    moving: list[nn.Parameter] = []
    for group in stage.groups:
        moving += model.groups[group]
    if optimization.processes > 1:
        total = distributed.sum_gradients_(moving, total)
    if check:
        check_gradients(model.groups)
    before: dict[str, Tensor] = {}
    if "tokens" in stage.groups and (stage.norm or config.tokens.norm) != "none":
        for name, embedding in model.embeddings.items():
            before[name] = embedding.rows.detach().clone()
    norm = update_parameters(moving, model, optimization, stage, config, total)
    control_token_norms(model, optimization, stage, config, before)
    if config.optimizer.max_update_norm:
        limit_updates(model, optimization, stage, config, readings)
    return StepResult(total, norm, mean_readings(readings) if readings else {})


def raise_explained(error: Exception, functions: StepFunctions, config: Config) -> NoReturn:
    """Raises the error of a loss or a step; one in a user's file as a UserError with its line."""
    with ExitStack() as stack:
        if config.loss not in losses.LOSSES:
            stack.enter_context(explain_errors(f"loss {config.loss}", functions.loss))
        if functions.own_step is not None:
            stack.enter_context(explain_errors(f"step {config.step}", functions.own_step))
        raise error


def mean_readings(readings: Readings) -> dict[str, Tensor]:
    """Name -> mean of its values over the micro-batches of a step."""
    return {name: torch.stack(values).mean() for name, values in readings.items()}


def update_parameters(
    moving: Sequence[nn.Parameter],
    model: Model,
    optimization: Optimization,
    stage: Stage,
    config: Config,
    loss: Tensor,
) -> Tensor:
    """Clips the gradients of the stage's parameters and steps the optimizer; returns their norm
    before clipping. The step changes nothing, and optimization.skip is 1, where the loss [] or the
    norm is not finite.
    """
    optimizer, scaler, skip = optimization.optimizer, optimization.scaler, optimization.skip
    if scaler is not None:
        scaler.unscale_(moving)
    for name in stage.groups:
        for change_gradients in model.gradient_hooks.get(name, ()):
            change_gradients()
    norm = gradients.clip_gradients_(moving, config.optimizer.clip or math.inf)
    is_bad = ~(loss.isfinite() & norm.isfinite())
    skip.copy_(is_bad if scaler is None else (scaler.found_inf != 0) | is_bad)
    gradients.step_unless(optimizer, skip)
    if scaler is not None:
        scaler.update(~loss.isfinite())  # another scale would not change such a loss
    return norm


def control_token_norms(
    model: Model,
    optimization: Optimization,
    stage: Stage,
    config: Config,
    before: Mapping[str, Tensor],
) -> None:
    """Apply the norm control to the learned token rows after an optimizer step: pull each row's
    norm to its target at 100 times its learning rate, rescale all rows to the table's std, or hold
    rows that had reached their target. `before`: text encoder -> its rows before the step, which
    stay where the step was skipped.
    """
    how = stage.norm or config.tokens.norm
    for group in optimization.optimizer.param_groups:
        if group["name"] != "tokens" or group["name"] not in stage.groups or how == "none":
            continue
        lr = group["lr"]
        d = read_distance(optimization.optimizer, group)
        rate = torch.as_tensor(100 * lr * (1.0 if d is None else d), dtype=torch.float64)
        for name, embedding in model.embeddings.items():
            if how == "rescale":
                tokens.rescale_std_(embedding.rows, model.table_stds[name])
            elif how == "stop":
                limit = model.norm_targets[name][0]
                tokens.hold_rows_(embedding.rows, before[name], limit=limit)
            else:
                target = model.norm_targets[name]
                tokens.pull_norms_(embedding.rows, target, rate=rate.clamp(max=1.0))
            rows = embedding.rows.detach()
            rows.copy_(torch.where(optimization.skip != 0, before[name], rows))


def limit_updates(
    model: Model, optimization: Optimization, stage: Stage, config: Config, readings: Readings
) -> None:
    """Apply --optimizer.max-update-norm to the adapters that the stage trains, after an optimizer
    step that was not skipped, and log how many layers it scaled and the largest norm before that.
    """
    networks = trained_networks(model, stage)
    if not networks:
        return
    limit = config.optimizer.max_update_norm
    limited = limit_update_norms_(networks, limit, skip=optimization.skip)
    add_reading(readings, "limited_layers", limited.scaled)
    add_reading(readings, "largest_update", limited.largest)


def trained_networks(model: Model, stage: Stage) -> list[nn.Module]:
    """The networks whose adapters the stage trains."""
    found = []
    for name, module in model.adapted.items():
        group = "text_encoder" if name in model.encoders else "denoiser"
        if group in stage.groups:
            found.append(module)
    return found


def check_gradients(groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Raises UserError for a trainable group without a gradient."""
    for name, params in groups.items():
        if params[0].requires_grad and all(p.grad is None for p in params):
            raise UserError(
                f"the group {name} gets no gradient from this loss; take it out of the stage"
            )


def set_step_dropout_keys(adapted: Mapping[str, nn.Module], keys: Tensor, step: Tensor) -> None:
    """Set the keys [b] of the examples in the next forward pass for the adapters' dropout."""
    for module in adapted.values():
        injection.set_dropout_keys(module, keys, step)
