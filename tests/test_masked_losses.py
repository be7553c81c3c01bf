"""Scales of masked losses against the formulas of their sources, and the loss outside the mask."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train
from lora_core.config import Config, Stage, TokensConfig
from lora_core.diffusion.losses import LOSSES, StepOutput, add_preservation, is_capturable
from lora_core.diffusion.masked_losses import (
    MASK_FORMULAS,
    MASK_SCALES,
    add_outside_preservation,
    scale_masked_loss,
)
from lora_core.diffusion.noise import vp_schedule_from_config
from lora_core.errors import UserError
from lora_core.plugins import function_name
from tests.conftest import merged
from tests.opened_run import OpenedRun, open_parts
from tests.tiny_pipeline import SCALED
from training.inputs.step_inputs import make_step_inputs

SHAPE = (3, 4, 5, 7)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(b: int = 3) -> Tensor:
    """Grey masks, the second one of zeros and ones, the last one of ones (an image without one)."""
    drawn = torch.rand(b, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(9)).double()
    drawn[1] = (drawn[1] > 0.5).double()
    drawn[-1] = 1
    return drawn


def a_step(mask: Tensor | None, **lazy: Callable[[], Tensor]) -> StepOutput:
    out, target = numbers(*SHAPE), numbers(*SHAPE, seed=1)
    level = vp_schedule_from_config(SCALED).level(torch.tensor([5.0, 400.0, 900.0]))
    is_prior = torch.tensor([False, False, True])
    out.requires_grad_()
    return StepOutput(
        out, target, out, target, out, level, "epsilon", mask, is_prior, 0, dict(lazy), 1000.0
    )


# ---------------------------------------------------------------- the sources' formulas


def mixofshow(out: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """[b] of Mix-of-Show's trainer, which has no temperature: sum(e m) / sum(m)."""
    weights = mask**temperature
    return ((out - target) ** 2 * weights).sum([1, 2, 3]) / weights.sum([1, 2, 3])


def cloneofsimo(out: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """[b] of lora_pti's loss_step: both sides times the weights, and the mean over all."""
    weights = (mask + 0.01).pow(temperature)
    weights = weights / weights.max()
    return (out * weights - target * weights).pow(2).mean([1, 2, 3])


def unnormalized(out: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """[b] of sd-scripts' apply_masked_loss and the mean that follows it."""
    return ((out - target) ** 2 * mask**temperature).mean([1, 2, 3])


def mean(out: Tensor, target: Tensor, mask: Tensor, temperature: float) -> Tensor:
    return mixofshow(out, target, mask, temperature) / out.shape[1]


FORMULAS = {f.__name__: f for f in (mean, mixofshow, cloneofsimo, unnormalized)}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("scale", MASK_SCALES)
def test_a_scale_is_its_sources_formula(scale: str, temperature: float) -> None:
    step = a_step(MASK_SCALES[scale].weights(masks(), temperature))
    rows = scale_masked_loss(LOSSES["mse"], scale)(step)
    expected = FORMULAS[scale](step.out, step.target, masks(), temperature)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0)
    (ours,) = torch.autograd.grad(rows.sum(), step.out, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), step.out)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


# the other entries of LOSSES have a scale of their own
OF_THE_OUTPUT = [name for name, loss in LOSSES.items() if not hasattr(loss, "reads_attention")]


@pytest.mark.parametrize("name", OF_THE_OUTPUT)
def test_every_loss_is_scaled_alike(name: str) -> None:
    """A scale is a factor of the loss with the same weights, so ours / sources is that of mse."""
    step = a_step(masks())
    channels, area = SHAPE[1], masks().mean((1, 2, 3))
    rows = LOSSES[name](step)
    for scale, factor in {"mean": 1.0, "mixofshow": channels, "unnormalized": area}.items():
        torch.testing.assert_close(scale_masked_loss(LOSSES[name], scale)(step), rows * factor)


def test_a_run_says_how_masks_act(config: Config, plain: None, capsys: Any) -> None:
    config = merged(config, {"data": {"masks": "file"}, "prior": {"outside_mask": 0.5}})
    open_parts(replace(config, mask_scale="mixofshow"))
    said = (
        "loss: mse of epsilon, not weighted, masked: sum(m e) / sum(m), plus 0.5 times the change"
    )
    assert said in capsys.readouterr().out
    assert MASK_FORMULAS.keys() == MASK_SCALES.keys()


def test_a_scaled_loss_keeps_its_name_and_what_a_graph_can_hold() -> None:
    huber = functools.partial(LOSSES["huber"], delta=0.2)
    for loss in (scale_masked_loss(huber, "mixofshow"), add_outside_preservation(huber, 1.0)):
        assert function_name(loss) == "huber" and is_capturable(loss)
    assert scale_masked_loss(huber, "mean") is huber
    huber.reads_attention = True  # type: ignore[attr-defined]
    assert add_outside_preservation(huber, 1.0).reads_attention  # type: ignore[attr-defined]
    assert not is_capturable(scale_masked_loss(lambda step: step.x0.sum(), "mixofshow"))


# ---------------------------------------------------------------- outside the mask


def test_the_loss_outside_is_the_weighted_difference_from_the_base_model() -> None:
    base = numbers(*SHAPE, seed=2)
    step = a_step(masks(), plain_base_out=lambda: base)
    rows = add_outside_preservation(LOSSES["l1"], 0.3)(step)
    outside = 1 - masks()[:2]
    change = (outside * (step.out - base)[:2] ** 2).sum((1, 2, 3)) / (4 * outside.sum((1, 2, 3)))
    expected = LOSSES["l1"](step) + 0.3 * torch.cat([change, torch.zeros(1)])  # nothing is outside
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(rows.sum(), step.out)
    assert slope.isfinite().all()
    both = add_preservation(add_outside_preservation(LOSSES["l1"], 0.3), 2.0)
    step.lazy["preserved"] = lambda: (step.out, base)
    preserved = (step.out - base).square().mean((1, 2, 3))
    torch.testing.assert_close(both(step), expected + 2 * preserved, rtol=1e-12, atol=0)
    with pytest.raises(UserError, match=r"step\.plain_base_out"):
        add_outside_preservation(LOSSES["mse"], 0.3)(a_step(masks()))


@pytest.mark.parametrize("scale", MASK_SCALES)
def test_outside_is_what_the_drawn_mask_leaves_whatever_the_weights(scale: str) -> None:
    """Grey of 0.4 everywhere is the brightest of its batch: cloneofsimo's weights are 1 there."""
    base, drawn = numbers(*SHAPE, seed=2), masks()
    drawn = torch.cat([drawn[:1], torch.full_like(drawn, 0.4)[:2]])
    weights = MASK_SCALES[scale].weights(drawn, 2.0)
    step = replace(a_step(weights, plain_base_out=lambda: base), unweighted_mask=drawn)
    plain = scale_masked_loss(LOSSES["mse"], scale)
    outside = 1 - drawn
    change = (outside * (step.out - base) ** 2).sum((1, 2, 3)) / (4 * outside.sum((1, 2, 3)))
    found = add_outside_preservation(plain, 0.3)(step)
    torch.testing.assert_close(found, plain(step) + 0.3 * change, rtol=1e-12, atol=0)


def output_of(s: OpenedRun) -> StepOutput:
    """The StepOutput of the first batch, with the model as it is."""
    batch = next(iter(s.data.batches(s.config, 0, 1)))
    (x,) = make_step_inputs(s.source, batch, s.config.stages[0], 0, check=True)
    found: list[StepOutput] = []

    def watched(step: StepOutput) -> Tensor:
        found.append(step)
        return s.functions.loss(step)

    train.training_step(s.model, x, s.config, watched)
    return found[0]


def test_the_base_model_reads_ordinary_words(
    config: Config, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output stays the same while adapters and tokens train."""
    config = merged(
        replace(
            config,
            stages=(Stage(3, ("denoiser", "text_encoder", "tokens")),),
            tokens=TokensConfig(init=("cat",), vectors=3),
        ),
        {"data": {"masks": "file"}, "prior": {"outside_mask": 0.5}},
    )
    s = open_parts(config)
    read: list[str] = []
    encode_prompts = s.model.family.encode_prompts

    def watched(prompts: Sequence[str]) -> Any:
        read.extend(prompts)
        return encode_prompts(prompts)

    monkeypatch.setattr(s.model.family, "encode_prompts", watched)
    before = output_of(s)
    s.take_steps(3)
    after = output_of(s)
    assert read == ["a photo of cat"]
    assert not after.plain_base_out.requires_grad
    assert torch.equal(before.plain_base_out, after.plain_base_out)
    assert not torch.equal(before.base_out, after.base_out)  # the tokens have moved


def test_a_heavy_weight_holds_the_output_outside(config: Config, plain: None) -> None:
    changes = []
    for weight in (0.0, 30.0):
        own = merged(
            replace(config, out=f"{config.out}{weight:g}", stages=(Stage(8),)),
            {"data": {"masks": "file"}, "prior": {"outside_mask": weight}},
        )
        s = open_parts(own)
        s.take_steps(8)
        step = output_of(s)
        assert step.mask is not None
        moved = (step.out - step.base_out).square()
        changes.append(((1 - step.mask) * moved).sum().item())
    assert changes[1] < 0.1 * changes[0]


# ---------------------------------------------------------------- in a run


def test_a_run_takes_the_scale_and_the_stages_temperature(config: Config, plain: None) -> None:
    """Temperature 2 of cloneofsimo's scale is applied once."""
    config = merged(
        replace(config, mask_scale="cloneofsimo", stages=(Stage(1, mask_temperature=2.0),)),
        {"data": {"masks": "file"}},
    )
    s = open_parts(config)
    step = output_of(s)
    batch = next(iter(s.data.batches(config, 0, 1)))
    assert batch.mask is not None and step.mask is not None
    small = nn.functional.interpolate(batch.mask, step.mask.shape[-2:], mode="area")
    lifted = (small + 0.01) ** 2
    torch.testing.assert_close(step.mask, (lifted / lifted.max()) ** 2)
    assert step.drawn_mask is not None and torch.equal(step.drawn_mask, small)
    expected = cloneofsimo(step.out, step.target, small, 2.0)
    torch.testing.assert_close(s.functions.loss(step), expected, rtol=1e-5, atol=0)


def test_scales_and_the_outside_weight_change_what_is_learned(config: Config, plain: None) -> None:
    config = merged(config, {"data": {"masks": "auto"}, "prior": {"prompt": "a cat", "count": 1}})
    changes: list[dict[str, Any]] = [{"mask_scale": scale} for scale in MASK_SCALES]
    changes.append({"prior": {"outside_mask": 3.0}})
    learned = []
    for i, change in enumerate(changes):
        s = open_parts(merged(replace(config, out=f"{config.out}{i}"), change))
        s.take_steps(2)
        parts = [p.detach().flatten() for p in s.model.groups["denoiser"]]
        learned.append(torch.cat(parts))
    for one, other in combinations(learned, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mask_scale": "mixofshow"}, "--mask-scale has no effect without masks"),
        ({"prior": {"outside_mask": 1.0}}, "--prior.outside-mask has no effect without masks"),
    ],
)
def test_without_masks_both_are_refused(config: Config, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train.train(merged(config, change))
