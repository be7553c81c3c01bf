"""Examples of losses and steps against their formulas: examples/my_step.py and second forwards,
contrastive_flow.py, lpips_like.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train
from examples.contrastive_flow import contrastive_flow
from examples.lpips_like import LAYERS, feature_kernels, lpips_like
from examples.my_step import antithetic_step
from lora_core.config import Config, Stage
from lora_core.diffusion.losses import StepOutput, mse
from lora_core.diffusion.noise import flow_schedule
from lora_core.errors import UserError
from tests.conftest import merged, rows
from tests.test_losses import SD, make


def test_the_loss_is_the_mean_over_a_noise_and_its_opposite(config: Config, quick: None) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss(step: StepOutput) -> Tensor:
        found = mse(step)
        wanted = (step.out.double() - step.target.double()).square().mean((1, 2, 3))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
        seen.append((step.eps, step.x_t, wanted.detach()))
        return found

    stages = (Stage(2, ("denoiser", "tokens")),)
    run = train.train(replace(config, stages=stages), loss=loss, step=antithetic_step)
    assert len(seen) == 4  # two forward passes in each of two steps
    for first, second, row in zip(seen[::2], seen[1::2], rows(run)[1:]):
        assert torch.equal(first[0], -second[0]) and not torch.equal(first[1], second[1])
        wanted = torch.cat([first[2], second[2]]).mean()
        assert row["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert 'step = "examples/my_step.py:antithetic_step"' in (run / "config.toml").read_text()


def test_in_training_out_at_the_steps_own_level_is_out(config: Config, quick: None) -> None:
    """And the base model's; at another level both differ."""

    def loss(step: StepOutput) -> Tensor:
        assert torch.equal(step.out_at(step.level), step.out)
        assert torch.equal(step.base_out_at(step.level), step.base_out)
        assert step.schedule is not None and step.out_at(step.level).requires_grad
        other = step.schedule.level((step.level.t + 7) % 900)
        assert not torch.allclose(step.out_at(other), step.out)
        assert not torch.allclose(step.base_out_at(other), step.base_out)
        assert not step.base_out_at(other).requires_grad
        torch.testing.assert_close(step.decode(step.x0_pred), step.pixels)
        error = step.out_at(other) - step.target_at(other)
        return mse(step) + error.square().mean((1, 2, 3))

    train.train(replace(config, stages=(Stage(2, ("denoiser", "tokens")),)), loss=loss)


# ---------------------------------------------------------------- contrastive flow matching


def contrast_by_hand(step: StepOutput, strength: float) -> Tensor:
    """The objective of arXiv 2506.05350 for the velocity of the process, a row at a time.

    v = eps - x0 on a straight line. On the circle alpha = cos, sigma = sin it is alpha eps - sigma
    x0; an error e of epsilon is one of e / alpha of this velocity, which gives the common unit.
    """
    found = []
    for i in range(len(step.x0)):
        x0, eps, x_t, out = (x[i].double() for x in (step.x0, step.eps, step.x_t, step.out))
        alpha, sigma = step.level.alpha[i].double(), step.level.sigma[i].double()
        d_alpha, d_sigma, unit = -sigma, alpha, 1.0
        if step.prediction == "flow":
            d_alpha, d_sigma = -torch.ones_like(alpha), torch.ones_like(alpha)
        if step.prediction == "epsilon":
            out, unit = (out - sigma * x_t) / alpha, float(alpha**2)
        own = d_alpha * x0 + d_sigma * eps
        other = d_alpha * step.x0[i - 1].double() + d_sigma * step.eps[i - 1].double()
        squares = (out - own).square().mean() - strength * (out - other).square().mean()
        found.append(unit * squares)
    return torch.stack(found)


@pytest.mark.parametrize("prediction", ["flow", "v_prediction", "epsilon"])
def test_contrastive_flow_is_its_formula_in_float64(prediction: str) -> None:
    step = make(prediction, schedule=flow_schedule() if prediction == "flow" else SD)
    for strength in (0.0, 0.05, 0.5):
        wanted = contrast_by_hand(step, strength)
        found = contrastive_flow(step, strength=strength)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(contrastive_flow(step, strength=0.0), mse(step))


def test_contrastive_flow_trains_the_embedded_model_with_whole_batches(
    config: Config, quick: None
) -> None:
    toy = replace(config, model="toy/model", stages=(Stage(1, ("denoiser", "tokens")),))
    seen: list[Tensor] = []

    def watched(step: StepOutput) -> Tensor:
        seen.append(contrast_by_hand(step, 0.05).detach())
        return contrastive_flow(step)

    run = train.train(replace(toy, batch_size=3), loss=watched)
    assert rows(run)[1]["loss"] == pytest.approx(float(seen[0].mean()), rel=1e-4)
    by_name = replace(toy, loss="examples/contrastive_flow.py:contrastive_flow", out=toy.out + "2")
    with pytest.raises(UserError, match=r"contrastive_flow\.whole_batch = True"):
        train.train(replace(by_name, accumulation=2))
    with pytest.raises(
        UserError, match=r"got 1 image\(s\) and strength 0\.05; it compares at least 2"
    ):
        train.train(replace(by_name, batch_size=1))
    with pytest.raises(UserError, match=r"strength 1; it compares .* it has no minimum"):
        contrastive_flow(make(), strength=1.0)


# ---------------------------------------------------------------- a perceptual loss


def distance_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1 of arXiv 1801.03924 with w = 1, by torch's modules, a row at a time in float64."""
    total = []
    for image, other in zip(a.double(), b.double(), strict=True):
        features, distance = [image, other], torch.zeros((), dtype=torch.float64)
        for kernel, (c, n) in zip(feature_kernels(a.device, torch.float32), LAYERS, strict=True):
            layer = torch.nn.Conv2d(c, n, 3, stride=2, padding=1, bias=False).double()
            layer.weight.data.copy_(kernel)
            features = [layer(x[None])[0].clamp(min=0) for x in features]
            y, y0 = (torch.nn.functional.normalize(x, dim=0) for x in features)
            height, width = y.shape[1:]
            distance = distance + (y - y0).square().sum() / (height * width)
        total.append(distance)
    return torch.stack(total)


def test_lpips_like_is_the_distance_of_decoded_images(config: Config, quick: None) -> None:
    """In a training of the embedded model, whose decoder the gradient passes."""
    toy = replace(config, model="toy/model", stages=(Stage(2, ("denoiser", "tokens")),))
    seen: list[Tensor] = []

    def watched(step: StepOutput) -> Tensor:
        found, image = lpips_like(step), step.decode(step.x0)
        wanted = distance_by_hand(step.pixels.detach(), image)
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-4, atol=1e-5)
        assert not distance_by_hand(image, image).any() and found.min() > 0.01
        seen.append(wanted)
        return found

    change = {"weighting": "min_snr", "data": {"resolution": 32}}
    watched.weighting = "none"  # type: ignore[attr-defined]
    run = train.train(merged(toy, change | {"weighting": "none"}), loss=watched)
    logged = [row["loss"] for row in rows(run) if "loss" in row]
    assert logged == pytest.approx([float(wanted.mean()) for wanted in seen], rel=1e-4)
    by_name = merged(toy, change | {"loss": "examples/lpips_like.py:lpips_like", "out": "x"})
    with pytest.raises(UserError, match="--weighting min_snr would weight the loss lpips_like"):
        train.train(by_name)
