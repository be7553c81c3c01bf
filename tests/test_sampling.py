"""Samplers: against diffusers' schedulers from the same noise with a fake network, against each
other, and against exact answers.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.diffusion.noise import (
    NoiseLevel,
    Schedule,
    edm_schedule,
    flow_schedule,
    vp_schedule_from_config,
)
from lora_core.diffusion.prediction import PREDICTIONS
from lora_core.diffusion.sampling import (
    SAMPLERS,
    ddim,
    dpmpp_2m,
    euler,
    euler_ancestral,
    find_sampler,
    flow_euler,
    guided_denoiser,
    run_sampler,
    sampler_levels,
    sampler_timesteps,
    split_for_refiner,
    start_latents,
    step_level,
    try_sampler,
)
from lora_core.errors import UserError

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
VP = vp_schedule_from_config(SD)
SPACINGS = ["leading", "trailing", "linspace"]


def network(x: Tensor, t: float) -> Tensor:
    """A fake network: bounded, not linear in x, mixes pixels, and depends on t."""
    return torch.tanh(0.8 * x + 0.1 * x.roll(1, -1) + math.sin(t / 300)) * (
        0.9 + 0.1 * math.cos(t / 100)
    )


def noise(i: int) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(100 + i))


EPS = noise(-1)


def ours(prediction: str) -> Callable[[Tensor, NoiseLevel], Tensor]:
    return guided_denoiser(lambda x, level, _: network(x, level.t[0].item()), prediction, None)


def theirs(scheduler: Any, steps: int, x: Tensor, skip: int = 0, **step: Any) -> Tensor:
    """diffusers' own loop, `x` already in its convention; `skip` steps are left out as its
    image-to-image pipelines do.
    """
    scheduler.set_timesteps(steps)
    if skip and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip)
    for t in scheduler.timesteps[skip:]:
        x = scheduler.step(
            network(scheduler.scale_model_input(x, t), float(t)), t, x, **step
        ).prev_sample
    return x


def build(name: str, **config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name).from_config(SD | config)


def settings(prediction: str, spacing: str) -> dict[str, Any]:
    return {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}


# ---------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_is_diffusers(prediction: str, spacing: str, steps: int) -> None:
    scheduler = build(
        "DDIMScheduler", **settings(prediction, spacing), clip_sample=False, set_alpha_to_one=False
    )
    path = sampler_levels("ddim", VP, steps, spacing=spacing)
    torch.testing.assert_close(
        ddim(ours(prediction), start_latents(EPS, path), path),
        theirs(scheduler, steps, EPS),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_is_diffusers_where_the_steps_do_not_divide_the_schedule(prediction: str) -> None:
    scheduler = build(
        "DDIMScheduler",
        **settings(prediction, "leading"),
        clip_sample=False,
        set_alpha_to_one=False,
    )
    path = sampler_levels("ddim", VP, 7)
    torch.testing.assert_close(
        ddim(ours(prediction), EPS, path), theirs(scheduler, 7, EPS), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_diffusers(eta: float) -> None:
    scheduler = build(
        "DDIMScheduler",
        **settings("v_prediction", "leading"),
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(20)
    x = EPS
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, float(t)), t, x, eta=eta, variance_noise=noise(i)).prev_sample
    torch.testing.assert_close(
        ddim(ours("v_prediction"), EPS, sampler_levels("ddim", VP, 20), eta=eta, noise=noise),
        x,
        atol=1e-4,
        rtol=1e-4,
    )


def at_start(path: NoiseLevel) -> float:
    """diffusers' Euler works with x / alpha."""
    return 1 / path.alpha[0].item()


@pytest.mark.parametrize("steps", [4, 7, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_is_diffusers(prediction: str, spacing: str, steps: int) -> None:
    scheduler = build("EulerDiscreteScheduler", **settings(prediction, spacing))
    path = sampler_levels("euler", VP, steps, spacing=spacing)
    if spacing == "leading":
        scheduler.set_timesteps(steps)
        assert scheduler.init_noise_sigma == pytest.approx(at_start(path), rel=1e-4)
    expected = theirs(scheduler, steps, EPS * at_start(path))
    torch.testing.assert_close(
        euler(ours(prediction), start_latents(EPS, path), path), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_is_diffusers(
    prediction: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = build("EulerAncestralDiscreteScheduler", **settings(prediction, spacing))
    count = iter(range(steps))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor",
        lambda *_, **__: noise(next(count)),
    )
    path = sampler_levels("euler_ancestral", VP, steps, spacing=spacing)
    expected = theirs(scheduler, steps, EPS * at_start(path))
    torch.testing.assert_close(
        euler_ancestral(ours(prediction), start_latents(EPS, path), path, noise=noise),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("steps", [1, 2, 9, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpmpp_2m_is_diffusers(prediction: str, spacing: str, steps: int) -> None:
    scheduler = build("DPMSolverMultistepScheduler", **settings(prediction, spacing))
    path = sampler_levels("dpmpp_2m", VP, steps, spacing=spacing)
    torch.testing.assert_close(
        dpmpp_2m(ours(prediction), start_latents(EPS, path), path),
        theirs(scheduler, steps, EPS),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_zero_terminal_snr_from_pure_noise_is_diffusers(name: str) -> None:
    config = settings("v_prediction", "trailing") | {"rescale_betas_zero_snr": True}
    path = sampler_levels(name, vp_schedule_from_config(SD | config), 20, spacing="trailing")
    assert path.alpha[0] == 0
    scheduler = build(
        {
            "ddim": "DDIMScheduler",
            "euler": "EulerDiscreteScheduler",
            "dpmpp_2m": "DPMSolverMultistepScheduler",
        }[name],
        **config,
    )
    if name == "ddim":
        scheduler = build("DDIMScheduler", **config, clip_sample=False, set_alpha_to_one=False)
    x = EPS * 2**12 if name == "euler" else EPS  # diffusers' Euler divides by alpha = 2^-12 there
    error = (
        (
            SAMPLERS[name].run(ours("v_prediction"), start_latents(EPS, path), path)
            - theirs(scheduler, 20, x)
        )
        .abs()
        .max()
    )
    unit = (
        2**12 * torch.finfo(torch.float32).eps
    )  # a rounding of what is divided by their alpha of 2^-12
    assert error < (unit if name == "ddim" else 4 * unit)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_diffusers(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 10, 10))
    x = EPS
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t) / 1000), t, x).prev_sample
    path = sampler_levels("flow_euler", flow_schedule(shift=shift), 10)
    torch.testing.assert_close(
        flow_euler(ours("flow"), start_latents(EPS, path), path), x, atol=1e-4, rtol=1e-4
    )


EDM_SCHEDULERS = {"euler": "EDMEulerScheduler", "dpmpp_2m": "EDMDPMSolverMultistepScheduler"}


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 12, 30])
@pytest.mark.parametrize(
    "config", [{}, {"sigma_min": 0.05, "sigma_max": 20.0, "rho": 5.0}], ids=["playground", "other"]
)
def test_the_steps_of_edm_are_diffusers(name: str, steps: int, config: dict[str, float]) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), EDM_SCHEDULERS[name])(**config)
    scheduler.set_timesteps(steps)
    path = sampler_levels(name, edm_schedule(**config), steps)
    torch.testing.assert_close(path.sigma.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(path.t[:-1].float(), scheduler.timesteps, rtol=1e-5, atol=1e-6)
    assert path.sigma[-1] == 0 and (path.alpha == 1).all()
    torch.testing.assert_close(start_latents(EPS, path), EPS * scheduler.init_noise_sigma)


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 12, 30])
def test_edm_samplers_are_diffusers(name: str, steps: int) -> None:
    scheduler = getattr(pytest.importorskip("diffusers"), EDM_SCHEDULERS[name])(
        sigma_min=0.002, sigma_max=80.0, rho=7.0, sigma_data=0.5
    )
    path = sampler_levels(name, edm_schedule(), steps)
    x = start_latents(EPS, path)
    torch.testing.assert_close(
        SAMPLERS[name].run(ours("edm"), x, path), theirs(scheduler, steps, x), atol=1e-4, rtol=1e-4
    )


def second(x: Tensor, t: float) -> Tensor:
    """Another fake network, the refiner."""
    return network(0.7 * x.flip(-1), 2 * t + 100)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25, 0.499])
@pytest.mark.parametrize("steps", [7, 20, 25])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_base_and_refiner_take_over_where_diffusers_do(name: str, steps: int, share: float) -> None:
    """denoising_end of the pipeline of the base model, denoising_start of the image to image
    pipeline: one scheduler each.
    """
    scheduler = {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
    }[name]
    config = settings("epsilon", "leading") | (
        {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    )
    path = sampler_levels(name, VP, steps)
    first, rest = split_for_refiner(path, VP, share)
    x, cutoff = EPS * (at_start(path) if name == "euler" else 1), round(1000 - share * 1000)
    for part, net in enumerate((network, second)):
        other = build(scheduler, **config)
        other.set_timesteps(steps)
        times = [t for t in other.timesteps if (t >= cutoff) == (part == 0)]
        if part and hasattr(other, "set_begin_index"):
            other.set_begin_index(steps - len(times))
        assert len(times) == len((first, rest)[part].t) - 1
        for t in times:
            x = other.step(net(other.scale_model_input(x, t), float(t)), t, x).prev_sample
    run = SAMPLERS[name].run
    halfway = run(ours("epsilon"), start_latents(EPS, path), first)
    mine = run(
        guided_denoiser(lambda x, level, _: second(x, level.t[0].item()), "epsilon", None),
        halfway,
        rest,
    )
    torch.testing.assert_close(mine, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", [VP, flow_schedule(shift=3.0)], ids=["vp", "flow"])
def test_a_split_path_is_the_path(schedule: Schedule) -> None:
    path, prediction = (
        sampler_levels("euler", schedule, 10),
        "flow" if schedule.kind == "flow" else "epsilon",
    )
    first, rest = split_for_refiner(path, schedule, 0.7)
    assert all(
        torch.equal(torch.cat([a[:-1], b]), whole)
        for a, b, whole in zip(first, rest, path, strict=True)
    )
    assert all(a[-1] == b[0] for a, b in zip(first, rest, strict=True))
    whole = euler(ours(prediction), EPS.double(), path)
    torch.testing.assert_close(
        euler(ours(prediction), euler(ours(prediction), EPS.double(), first), rest),
        whole,
        rtol=0,
        atol=0,
    )
    share = first.t[:-1] / (1000 if schedule.kind == "vp" else 1)
    assert (share >= 0.3 - 1e-6).all() and (
        rest.t / (1000 if schedule.kind == "vp" else 1) < 0.3
    ).all()


@pytest.mark.parametrize("strength", [0.5, 0.77])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_image_to_image_is_diffusers(name: str, strength: float) -> None:
    scheduler = {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
    }[name]
    config = settings("epsilon", "leading") | (
        {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    )
    other, image, steps = build(scheduler, **config), noise(50), 20
    skip = steps - min(int(steps * strength), steps)
    path = sampler_levels(name, VP, steps, strength=strength)
    assert len(path.t) == steps - skip + 1
    other.set_timesteps(steps)
    if name != "ddim":
        other.set_begin_index(skip)
    x = other.add_noise(image, EPS, other.timesteps[skip : skip + 1])
    expected = theirs(build(scheduler, **config), steps, x, skip)
    torch.testing.assert_close(
        SAMPLERS[name].run(ours("epsilon"), start_latents(EPS, path, image), path),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "steps", [2, 3, 7, 20, 28, 50, 333, 999]
)  # one linspace step starts at t = 0 in diffusers and is refused here
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_diffusers(spacing: str, steps: int) -> None:
    scheduler = build("EulerDiscreteScheduler", **settings("epsilon", spacing))
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(
        torch.tensor(sampler_timesteps(VP, steps, spacing=spacing)).float(),
        scheduler.timesteps,
        rtol=1e-6,
        atol=1e-4,
    )


# ---------------------------------------------------------------- laws


def test_euler_is_ddim_without_eta_and_on_a_flow_is_flow_euler() -> None:
    x64 = EPS.double()
    for schedule, prediction in ((VP, "v_prediction"), (flow_schedule(shift=2.0), "flow")):
        path = sampler_levels("euler", schedule, 9)
        torch.testing.assert_close(
            euler(ours(prediction), x64, path),
            ddim(ours(prediction), x64, path),
            rtol=0,
            atol=1e-10,
        )
    torch.testing.assert_close(
        euler(ours("flow"), x64, path), flow_euler(ours("flow"), x64, path), rtol=0, atol=1e-10
    )


def exact(mean: float, std: float) -> Callable[[Tensor, NoiseLevel], Tensor]:
    """E[x0 | x_t] for x0 ~ N(mean, std^2), the perfect denoiser."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        a, s = level.like(x).alpha, level.like(x).sigma
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    return denoise


@pytest.mark.parametrize(
    "schedule", [VP, flow_schedule(), edm_schedule()], ids=["vp", "flow", "edm"]
)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_deterministic_samplers_carry_a_gaussian_along_its_probability_flow(
    name: str, schedule: Schedule
) -> None:
    """The flow ODE keeps (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2), exactly; more steps come
    closer, the second order closest.
    """
    x, errors = (
        start_latents(EPS.double(), sampler_levels(name, schedule, 400, spacing="trailing")),
        [],
    )
    for steps in (100, 400):
        path = sampler_levels(name, schedule, steps, spacing="trailing")
        norm = (path.alpha**2 * 0.6**2 + path.sigma**2).sqrt()
        expected = path.alpha[-1] * 0.3 + norm[-1] * (x - path.alpha[0] * 0.3) / norm[0]
        errors.append((SAMPLERS[name].run(exact(0.3, 0.6), x, path) - expected).abs().max())
    assert errors[1] < errors[0] / 3 and errors[1] < (5e-3 if name == "dpmpp_2m" else 3e-2), errors


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_stochastic_samplers_keep_the_mean_and_the_variance(name: str) -> None:
    g = torch.Generator().manual_seed(5)
    path = sampler_levels(name, VP, 250, spacing="trailing")
    x, more = torch.randn(1, 1, 100, 200, generator=g), {"eta": 1.0} if name == "ddim" else {}
    out = SAMPLERS[name].run(
        exact(0.3, 0.6), x, path, noise=lambda i: torch.randn(1, 1, 100, 200, generator=g), **more
    )
    assert abs(out.mean() - 0.3) < 0.03 and abs(out.std() - 0.6) < 0.03


# ---------------------------------------------------------------- guidance


class Cond(NamedTuple):
    bias: Tensor

    @staticmethod
    def cat(parts: list["Cond"]) -> "Cond":
        return Cond(torch.cat([p.bias for p in parts]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_on_the_raw_output_in_one_call(prediction: str) -> None:
    calls = []

    def net(x: Tensor, level: NoiseLevel, cond: Cond) -> Tensor:
        calls.append(len(x))
        assert len(x) == len(level.t) == len(cond.bias)
        return torch.tanh(x) * cond.bias + level.like(x).sigma

    schedule = edm_schedule() if prediction == "edm" else VP
    level = schedule.level(schedule.ts[[100, 900]])
    cond, negative, x = (
        Cond(torch.full((2, 1, 1, 1), 0.7)),
        Cond(torch.full((2, 1, 1, 1), -0.2)),
        noise(3)[:2],
    )
    row = PREDICTIONS[prediction]
    x_in = x * row.c_in(level).reshape(-1, 1, 1, 1)
    out_c, out_u = (torch.tanh(x_in) * c.bias + level.like(x).sigma for c in (cond, negative))
    expected = row.x0(x, out_u + 7.5 * (out_c - out_u), level)
    torch.testing.assert_close(
        guided_denoiser(net, prediction, cond, negative, 7.5)(x, level),
        expected,
        rtol=1e-5,
        atol=1e-5,
        check_dtype=False,
    )
    plain = row.x0(x, out_c, level)
    torch.testing.assert_close(
        guided_denoiser(net, prediction, cond)(x, level),
        plain,
        rtol=1e-5,
        atol=1e-5,
        check_dtype=False,
    )
    torch.testing.assert_close(
        guided_denoiser(net, prediction, cond, negative, 1.0)(x, level),
        plain,
        rtol=1e-5,
        atol=1e-5,
        check_dtype=False,
    )
    assert calls == [4, 2, 2]


# ---------------------------------------------------------------- samplers from files


OWN = """
import torch

def heun(denoise, x, levels, *, churn=0.0):
    return x * churn

def noisy(denoise, x, levels, noise):
    return x + noise(0)

noisy.drops_last = True
"""


def test_a_sampler_from_a_file_takes_noise_and_follows_the_rules_it_states(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    plain = find_sampler(f"{file}:heun", {"churn": 2.0})
    assert not plain.stochastic and not plain.drops_last and plain.ends_at_zero
    assert torch.equal(plain.run(None, EPS, None), 2 * EPS)
    noisy = find_sampler(f"{file}:noisy")
    assert noisy.stochastic and noisy.drops_last
    ours = sampler_levels(f"{file}:noisy", VP, 4, spacing="linspace")
    assert torch.equal(ours.t[:-1], sampler_levels("euler", VP, 5, spacing="linspace").t[:4])
    assert find_sampler("ddim", {"eta": 1.0}).stochastic and not find_sampler("euler").stochastic
    for name, args, said in (
        (f"{file}:heun", {"chrun": 1}, "takes no argument 'chrun'; it takes churn .nearest: churn"),
        (f"{file}:noisy", {"noise": 1}, "takes no argument 'noise' here: the program gives it"),
        ("ddim", {"eta": "big"}, "argument eta of sampler ddim is 'big', expected a number"),
        (f"{file}:hewn", {}, "has no function 'hewn'.*nearest: heun"),
    ):
        with pytest.raises(UserError, match=said):
            find_sampler(name, args)


def test_the_example_of_a_sampler_is_algorithm_1_of_edm() -> None:
    levels = sampler_levels("euler", VP, 6)
    denoise = ours("epsilon")
    found = run_sampler("examples/my_sampler.py:heun", {}, denoise, EPS.double(), levels, None)
    y = EPS.double() / levels.alpha[0]
    s = levels.sigma / levels.alpha

    def slope(y: Tensor, i: int) -> Tensor:
        x0 = denoise(levels.alpha[i] * y, step_level(levels, i, y))
        return (y - x0) / s[i]

    for i in range(6):
        d = slope(y, i)
        ahead = y + (s[i + 1] - s[i]) * d
        if s[i + 1] > 0:
            ahead = y + (s[i + 1] - s[i]) * (d / 2 + slope(ahead, i + 1) / 2)
        y = ahead
    torch.testing.assert_close(found, levels.alpha[-1] * y, rtol=1e-10, atol=1e-10)


FAILING = """
def short(denoise, x): ...
def attribute(denoise, x, levels): return levels.sigmas
def shape(denoise, x, levels): return x[:1]
def nothing(denoise, x, levels): denoise(x, levels.rows(slice(0, 2)))
def fields(denoise, x, levels): return denoise(x, next(iter(levels)))
def unbroadcast(denoise, x, levels): return denoise(x, levels)
"""


def test_a_sampler_that_fails_is_one_sentence_before_a_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FAILING)
    levels = sampler_levels("euler", VP, 3)
    for name, said in (
        ("short", r"called as fn\(denoise, x, levels\) and returns latents: TypeError"),
        ("attribute", r"no attribute 'sigmas' \(.*mine.py, line 3\)"),
        ("shape", r"returned \[1, 1, 2, 2\]; expected the latents \[2, 1, 2, 2\]"),
        ("nothing", "returned NoneType; expected the latents"),
        ("fields", r"another level than one for each image; sampling.step_level\(levels, i, x\)"),
        ("unbroadcast", "another level than one for each image"),
    ):
        with pytest.raises(UserError, match=said):
            try_sampler(f"{file}:{name}", {}, levels)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler_levels("eular", VP, 10), "'eular'.*nearest is 'euler'"),
        (lambda: sampler_levels("ddim", VP, 0), "at least 1 step, got 0"),
        (lambda: sampler_levels("ddim", VP, 1001, spacing="trailing"), "1001 steps"),
        (lambda: sampler_levels("ddim", VP, 1000), "1000 steps with leading spacing and offset 1"),
        (lambda: sampler_levels("euler", VP, 1, spacing="linspace"), "1 steps with linspace"),
        (lambda: sampler_levels("euler", VP, 5, spacing="karras"), "'karras'; choose leading"),
        (lambda: sampler_levels("euler", VP, 10, strength=0.05), "at least 0.1"),
        (lambda: sampler_levels("euler", VP, 10, strength=1.5), "strength 1.5"),
        (
            lambda: ddim(ours("epsilon"), EPS, sampler_levels("ddim", VP, 3), eta=0.5),
            "eta = 0.5.*noise",
        ),
        (lambda: flow_euler(ours("flow"), EPS, sampler_levels("euler", VP, 3)), "flow schedule"),
        (lambda: guided_denoiser(network, "epsilon", None, None, 7.5), "guidance scale 7.5"),
        (
            lambda: split_for_refiner(sampler_levels("euler", VP, 4), VP, 0.9999),
            "refiner start of 0.9999 leaves the base model 4 of 4",
        ),
        (
            lambda: split_for_refiner(sampler_levels("euler", VP, 4), VP, 0.01),
            "leaves the base model 0 of 4",
        ),
        (
            lambda: split_for_refiner(sampler_levels("euler", VP, 4), VP, 1.5),
            "refiner start of 1.5",
        ),
        (
            lambda: split_for_refiner(
                sampler_levels("euler", edm_schedule(), 4), edm_schedule(), 0.5
            ),
            "edm schedule",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_work(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call()
