"""Probes of the options of the loss and of a step's passes and images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_core import distributed, plugins
from lora_core.config import Config
from lora_core.diffusion import losses, noise
from training.inputs.subsets import has_class_subset
from training.probes import input_probes
from training.probes.first_step import FirstStep, forward_calls

# ---------------------------------------------------------------- the loss


def differs_from_mse(first: FirstStep) -> bool | None:
    """--loss: whether a built-in loss gives other numbers than mse."""
    if first.config.loss not in losses.LOSSES or not first.can_compare:
        return None
    if not torch.equal(first.losses(first.functions.loss), first.mse):
        return True
    return False if _compares_attention(first) else None


def _compares_attention(first: FirstStep) -> bool:
    """Whether a loss that reads attention has something to compare: an image with an uneven mask
    whose caption has learned tokens. True of other losses.
    """
    x, places = first.inputs[-1], first.inputs[-1].caption_tokens.learned
    if not getattr(first.functions.loss, "reads_attention", False):
        return True
    if x.mask is None or places is None:
        return False
    has_tokens = (places >= 0).any(1)
    masks = x.mask.flatten(1)
    return bool((has_tokens & (masks.amax(1) > masks.amin(1))).any())


def changes_loss(first: FirstStep) -> bool | None:
    """--loss-arg: whether each argument of a built-in loss changes its numbers, unless it is at its
    default.
    """
    c = first.config
    function = losses.LOSSES.get(c.loss)
    if function is None or not first.can_compare:
        return None
    shown = None
    for name in input_probes.differing_arguments(function, c.loss_arg):
        others = {key: value for key, value in c.loss_arg.items() if key != name}
        own, other = (
            first.losses(plugins.find_plugin(c.loss, losses.LOSSES, "loss", args))
            for args in (c.loss_arg, others)
        )
        if not torch.equal(own, other):
            shown = True
        elif _compares_attention(first):
            return False
    return shown


def weights_levels(first: FirstStep) -> bool | None:
    """--weighting: whether the losses are weighted, where a weight of the step is not 1; else
    whether some noise level's is not.
    """
    if not first.can_compare or first.functions.weights_itself:
        return None
    usual = replace(first.config, weighting=Config().weighting, weighting_arg={})
    x = first.inputs[-1]
    own, other = (_weights(first, c, x.level) for c in (first.config, usual))
    if torch.allclose(own, other, rtol=1e-5):  # less than a loss in fp32 would show
        return _differs_at_some_level(first, first.config, usual)
    return not torch.equal(first.mse, first.losses(losses.mse, config=usual))


def changes_weights(first: FirstStep) -> bool | None:
    """--weighting-arg: whether each argument changes some weight, unless it is at its default."""
    c = first.config
    function = losses.WEIGHTINGS.get(c.weighting)
    if function is None:
        return None
    shown = None
    for name in input_probes.differing_arguments(function, c.weighting_arg):
        others = {key: value for key, value in c.weighting_arg.items() if key != name}
        if not _differs_at_some_level(first, c, replace(c, weighting_arg=others)):
            return False
        shown = True
    return shown


def _weights(first: FirstStep, c: Config, level: noise.NoiseLevel) -> Tensor:
    prediction, space = first.model.family.prediction, c.noise.space
    return losses.loss_weights(c.weighting, level, prediction, space=space, **c.weighting_arg)


def _differs_at_some_level(first: FirstStep, a: Config, b: Config) -> bool:
    u = torch.linspace(0, 0.999, 64, dtype=torch.float64)
    level = noise.levels_at_quantiles(first.model.family.schedule.to("cpu"), u)
    return not torch.equal(_weights(first, a, level), _weights(first, b, level))


def changes_space(first: FirstStep) -> bool | None:
    """--noise.space: whether the errors are others than in the model's."""
    if not first.can_compare:
        return None
    usual = replace(first.config, noise=replace(first.config.noise, space="model"))
    own, other = (first.losses(_unweighted_mse, config=c) for c in (first.config, usual))
    return not torch.equal(own, other)


def _unweighted_mse(output: losses.StepOutput) -> Tensor:
    return losses.mse(output)


_unweighted_mse.weighting = "none"  # type: ignore[attr-defined]


def has_prediction(first: FirstStep) -> bool:
    """--noise.prediction: whether the targets are of that kind."""
    return first.model.family.prediction == first.config.noise.prediction


def reads_guidance(first: FirstStep) -> bool | None:
    """--noise.guidance: whether the losses are others than at the default scale."""
    if not first.can_compare:
        return None
    usual = replace(first.model, guidance=Config().noise.guidance)
    return not torch.equal(first.mse, first.losses(losses.mse, model=usual))


def preserves(first: FirstStep) -> bool | None:
    """--prior.swap, outside-mask: whether the loss runs the forward passes that they cost."""
    if not first.can_compare:
        return None
    prior, x = first.config.prior, first.inputs[-1]
    expected = 1 + 2 * bool(prior.swap)
    if prior.outside_mask and (x.mask is not None or x.unweighted_mask is not None):
        expected += 1
    calls: list[None] = []
    with forward_calls(first.model.denoiser, calls, lambda: None):
        first.losses(first.functions.loss)
    return len(calls) >= expected


def weights_preservation(first: FirstStep) -> bool | None:
    """--prior.swap-weight: whether a difference that is to be preserved adds so many times its
    square to a built-in loss; a loss from outside may add its own.
    """
    if first.config.loss not in losses.LOSSES or not first.can_compare:
        return None
    whole, weight = first.functions.loss, first.config.prior.swap_weight
    # a difference with which the loss grows by about 1, not lost beside what else is in it
    size = weight**-0.5 if weight else 1.0
    grown = first.losses(_loss_of_difference(whole, size))
    without = first.losses(_loss_of_difference(whole, 0.0))
    alone = losses.add_preservation(_zero_loss(whole), 1.0)
    once = first.losses(_loss_of_difference(alone, 1.0))
    return torch.allclose(grown - without, once if weight else torch.zeros_like(once), rtol=1e-2)


def _loss_of_difference(loss: Any, size: float) -> Any:
    """The loss where the outputs that are to be the same differ by `size` everywhere."""

    def with_difference(output: losses.StepOutput) -> Tensor:
        zero = torch.zeros_like(output.out, dtype=torch.float32)
        lazy = {**output.lazy, "preserved": lambda: (zero + size, zero)}
        rows: Tensor = loss(replace(output, lazy=lazy))
        return rows

    return losses.copy_declarations(with_difference, loss)


def _zero_loss(like: Any) -> Any:
    """A loss that is 0, weighted by noise level as another one is."""

    def zero(output: losses.StepOutput) -> Tensor:
        return output.out.new_zeros(len(output.out), dtype=torch.float32)

    return losses.copy_declarations(zero, like)


# ---------------------------------------------------------------- passes and images


def accumulates(first: FirstStep) -> bool:
    """--accumulation: whether the step had so many forward passes, of which processes share."""
    return len(first.inputs) == -(-first.config.passes_per_step // distributed.process_count())


def has_batch_size(first: FirstStep) -> bool:
    """--batch-size and --processes: whether the step had so many images, of all processes
    together.
    """
    images = first.config.images_per_step * (2 if first.config.data.pairs else 1)
    among = has_class_subset(first.config)  # class images take their turns among the others
    own = sum(int((~x.is_prior).sum()) if not among else len(x.is_prior) for x in first.inputs)
    return sum(distributed.gather_values(own)) == images
