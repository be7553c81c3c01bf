"""Noise: the identities of the schedules, diffusers' tables, and numbers that depend on an
example's key alone.
"""

import itertools
import math

import pytest
import torch

from lora_core.diffusion.densities import DENSITIES, bind_density
from lora_core.diffusion.noise import (
    NoiseLevel,
    NoiseSettings,
    RandomKeys,
    add_noise,
    edm_schedule,
    flow_schedule,
    karras_sigmas,
    keyed_generator,
    resolution_shift,
    sample_levels,
    sample_noise,
    shift_sigmas,
    vp_schedule,
    vp_schedule_from_config,
)
from lora_core.errors import UserError

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
CONFIGS = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "sd": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.001,
        "beta_end": 0.05,
        "num_train_timesteps": 37,
    },
    "trained": {"trained_betas": [0.01, 0.02, 0.05, 0.3], "beta_schedule": "linear"},
}


PRODUCTS = (
    32 * torch.finfo(torch.float32).eps
)  # theirs multiply up to 1000 numbers in fp32: sqrt(1000) roundings


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_vp_tables_equal_diffusers(name: str, rescale: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[name] | {"rescale_betas_zero_snr": rescale}
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double()
    ours = vp_schedule_from_config(config).alphas ** 2
    torch.testing.assert_close(ours, theirs, atol=PRODUCTS, rtol=0)


def test_defaults_of_an_empty_config_are_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.testing.assert_close(
        vp_schedule_from_config({}).alphas ** 2,
        diffusers.DDPMScheduler().alphas_cumprod.double(),
        atol=PRODUCTS,
        rtol=0,
    )


def test_known_snr_of_sd() -> None:
    snr = vp_schedule_from_config(SD).level(torch.tensor([0, 999])).snr
    torch.testing.assert_close(snr, torch.tensor([1175.47, 0.00468]), rtol=2e-3, atol=0)


def test_zero_terminal_snr_keeps_the_first_row_and_ends_in_pure_noise() -> None:
    plain, zero = (
        vp_schedule_from_config(SD),
        vp_schedule_from_config(SD | {"rescale_betas_zero_snr": True}),
    )
    assert zero.alphas[-1] == 0 and zero.sigmas[-1] == 1
    torch.testing.assert_close(zero.alphas[0], plain.alphas[0], rtol=1e-12, atol=0)
    last = zero.level(torch.tensor([999.0, 998.5, 998.0]))
    assert all(torch.isfinite(row).all() for row in last) and last.snr[0] == 0


@pytest.mark.parametrize(
    "schedule",
    [vp_schedule_from_config(SD), flow_schedule(shift=3.0), edm_schedule()],
    ids=["vp", "flow", "edm"],
)
def test_every_schedule_keeps_its_identity_and_gets_noisier(schedule) -> None:
    level = schedule.level(schedule.ts)
    law = {
        "vp": level.alpha**2 + level.sigma**2,
        "flow": level.alpha + level.sigma,
        "edm": level.alpha,
    }[schedule.kind]
    torch.testing.assert_close(law, torch.ones_like(law), rtol=1e-12, atol=0)
    torch.testing.assert_close(level.sigma, schedule.sigmas, rtol=1e-12, atol=0)
    torch.testing.assert_close(level.alpha, schedule.alphas, rtol=1e-12, atol=1e-15)
    assert (level.snr.diff() < 0).all() and level.t.dtype == torch.float64
    assert schedule.level(schedule.ts.float()).sigma.dtype == torch.float32


def test_vp_between_rows_is_linear_in_sigma_over_alpha() -> None:
    schedule = vp_schedule_from_config(SD)
    a, b = schedule.sigmas[10] / schedule.alphas[10], schedule.sigmas[11] / schedule.alphas[11]
    level = schedule.level(torch.tensor([10.25], dtype=torch.float64))
    torch.testing.assert_close(
        level.sigma / level.alpha, (0.75 * a + 0.25 * b)[None], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        level.alpha**2 + level.sigma**2, torch.ones(1).double(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("t", [-1.0, 999.5, math.nan])
def test_a_timestep_outside_of_the_table_is_refused(t: float) -> None:
    with pytest.raises(UserError, match=r"0\.\.999"):
        vp_schedule_from_config(SD).level(torch.tensor([0.0, t]))


def test_unknown_beta_schedule_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"sigmoid.*scaled_linear"):
        vp_schedule_from_config({"beta_schedule": "sigmoid"})


def test_flow_and_edm_tables_are_the_papers() -> None:
    s = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_sigmas(s, 3.0), 3 * s / (1 + 2 * s))
    torch.testing.assert_close(
        flow_schedule(steps=4).sigmas, torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    )
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0).double()
    torch.testing.assert_close(flow_schedule(shift=3.0).sigmas, theirs, atol=1e-6, rtol=0)
    euler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    euler.set_timesteps(18)
    ours = karras_sigmas(torch.linspace(1, 0, 18).double(), 0.002, 80.0, 7.0)
    torch.testing.assert_close(ours, euler.sigmas[:-1].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        edm_schedule(steps=18).ts.flip(0), euler.timesteps.double(), rtol=1e-5, atol=1e-6
    )


KEYS = RandomKeys(7, ("cat", "dog", "cat", "owl"), (0, 0, 1, 5))


@pytest.mark.parametrize("purpose", ["noise", "offset"])
def test_a_row_depends_on_its_own_key_only(purpose: str) -> None:
    whole = KEYS.normal(purpose, (3, 5))
    for i in range(4):
        assert torch.equal(KEYS.rows(slice(i, i + 1)).normal(purpose, (3, 5))[0], whole[i])
        assert torch.equal(KEYS.rows(slice(i, i + 1)).uniform(purpose)[0], KEYS.uniform(purpose)[i])
        assert KEYS.rows(slice(i, i + 1)).hashes(purpose)[0] == KEYS.hashes(purpose)[i]
    shuffled = RandomKeys(7, ("owl", "cat", "cat", "dog"), (5, 1, 0, 0))
    assert torch.equal(shuffled.normal(purpose, (3, 5)), whole[[3, 2, 0, 1]])


def test_seed_name_visit_and_purpose_each_change_the_numbers() -> None:
    keys = [
        (1, "a", 2, "n"),
        (2, "a", 2, "n"),
        (1, "b", 2, "n"),
        (1, "a", 3, "n"),
        (1, "a", 2, "m"),
    ]
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in keys]
    assert len({tuple(d.tolist()) for d in draws}) == 5
    assert torch.equal(draws[0], torch.rand(4, generator=keyed_generator(1, "a", 2, "n")))
    assert (
        keyed_generator(1, "1", 1, "x").initial_seed()
        != keyed_generator(11, "", 1, "x").initial_seed()
    )


def test_keyed_numbers_are_frozen() -> None:
    """A change here changes every published seed."""
    assert KEYS.hashes("dropout")[0].item() == -4169489937829620762


def many(n: int) -> RandomKeys:
    return RandomKeys(3, tuple(f"image {i}" for i in range(n)), (0,) * n)


def test_normal_is_normal_and_uniform_is_uniform() -> None:
    x, u = many(500).normal("noise", (100,)), many(500).uniform("t", (100,))
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5  # 4 standard errors
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5 and u.min() >= 0 and u.max() < 1
    rows = x - x.mean(1, keepdim=True)
    assert abs((rows[1:] * rows[:-1]).mean()) < 4 / n**0.5  # neighbours do not share their numbers


@pytest.mark.parametrize(
    "schedule",
    [vp_schedule_from_config(SD), flow_schedule(shift=3.0), edm_schedule()],
    ids=["vp", "flow", "edm"],
)
def test_draw_is_keyed_and_uniform_over_the_rows_of_the_range(schedule) -> None:
    level = sample_levels(schedule, many(2000), low=0.2, high=0.29)
    rows = (level.t[:, None].double() - schedule.ts).abs().argmin(1)
    assert rows.min() == 200 and rows.max() == 289
    counts = torch.bincount(rows - 200, minlength=90)
    assert ((counts - 2000 / 90) ** 2 / (2000 / 90)).sum() < 89 + 4 * (
        2 * 89
    ) ** 0.5  # chi squared, 4 sigma
    part = sample_levels(schedule, many(2000).rows(slice(500, 503)), low=0.2, high=0.29)
    assert (
        all(torch.equal(a, b[500:503]) for a, b in zip(part, level, strict=True))
        and level.sigma.dtype == torch.float32
    )


def test_draw_reaches_both_ends() -> None:
    rows = sample_levels(vp_schedule(torch.full((3,), 0.1)), many(200)).t
    assert set(rows.tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 0.5), (0.0, 1.1)])
def test_an_empty_timestep_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="timestep range"):
        sample_levels(vp_schedule_from_config(SD), KEYS, low=low, high=high)


def test_densities_are_the_papers() -> None:
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    sigma = DENSITIES["logit_normal"](u, mean=-1.0)
    assert (
        abs(sigma.mean() - 0.303) < 1e-3
    )  # measured on diffusers' density with its logit_mean = +1, whose table descends
    assert abs(sigma.median() - torch.sigmoid(torch.tensor(-1.0))) < 1e-4
    mode = DENSITIES["mode"](u, scale=1.29)
    assert mode.min() >= 0 and mode.max() <= 1 and abs(mode.mean() - 0.5) < 1e-6
    level = sample_levels(flow_schedule(), many(300), density=DENSITIES["logit_normal"])
    assert (
        abs(level.sigma.mean() - 0.5) < 4 * level.sigma.std() / 300**0.5
        and level.sigma.std() < 0.25
    )


PUBLISHED = {  # arXiv 2403.03206 section 3.1, equations 19 to 21
    "uniform": lambda t: torch.ones_like(t),
    "logit_normal": lambda t: (
        torch.exp(-(torch.logit(t) ** 2) / 2) / ((2 * math.pi) ** 0.5 * t * (1 - t))
    ),
    "cosmap": lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_quantile_function_has_the_published_density(name: str) -> None:
    """d u / d t of t = Q(u) is the density of t."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    t = bind_density(name)(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(1 / slope, PUBLISHED[name](t), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", DENSITIES)
def test_the_default_densities_are_symmetric(name: str) -> None:
    u = (torch.arange(1, 64).double()) / 64
    torch.testing.assert_close(
        bind_density(name)(u), 1 - bind_density(name)(1 - u), rtol=0, atol=1e-12
    )


def test_a_positive_logit_mean_is_more_noise() -> None:
    u = torch.tensor([0.5], dtype=torch.float64)
    assert bind_density("logit_normal", mean=1.0)(u) == torch.sigmoid(torch.ones(1).double())
    assert (
        sample_levels(
            flow_schedule(), many(100), density=bind_density("logit_normal", mean=1.0)
        ).sigma.mean()
        > 0.6
    )


def test_arguments_of_a_density_are_checked() -> None:
    assert bind_density("mode", scale=0.5)(torch.tensor([0.0]).double()) == 1
    for name, args, message in (
        ("mdoe", {}, "nearest is 'mode'"),
        ("logit_normal", {"mena": 1.0}, "'mena'.*mean, std"),
        ("cosmap", {"scale": 1.0}, "takes none"),
        ("mode", {"scale": "big"}, "'big', expected a number"),
        ("mode", {"scale": -3.0}, "leaves the fractions"),
        ("logit_normal", {"std": 0.0}, "leaves the fractions"),
    ):
        with pytest.raises(UserError, match=message):
            bind_density(name, **args)


def test_a_shift_moves_the_drawn_sigma_after_the_density() -> None:
    for schedule in (flow_schedule(), flow_schedule(shift=3.0)):
        plain, moved = (
            sample_levels(schedule, many(50), density=DENSITIES["mode"], shift=shift)
            for shift in (1.0, 2.5)
        )
        torch.testing.assert_close(moved.sigma, shift_sigmas(plain.sigma, 2.5), rtol=1e-6, atol=0)
        assert torch.equal(moved.t, moved.sigma) and (moved.sigma >= plain.sigma).all()
    twice = sample_levels(flow_schedule(shift=3.0), many(50), shift=2.0)
    torch.testing.assert_close(
        twice.sigma, sample_levels(flow_schedule(), many(50), shift=6.0).sigma, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "schedule", [vp_schedule_from_config(SD), edm_schedule()], ids=["vp", "edm"]
)
def test_a_shift_of_a_schedule_that_is_no_flow_is_refused(schedule) -> None:
    with pytest.raises(UserError, match="needs a flow"):
        sample_levels(schedule, KEYS, shift=2.0)
    with pytest.raises(UserError, match="above 0"):
        sample_levels(flow_schedule(), KEYS, shift=0.0)


@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 9000])
def test_the_shift_of_a_resolution_is_diffusers(tokens: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    sigmas = [1.0, 0.75, 0.5, 0.25, 0.01]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=sigmas, mu=calculate_shift(tokens))
    ours = shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), resolution_shift(tokens))
    torch.testing.assert_close(ours, theirs.sigmas[:-1].double(), atol=2e-7, rtol=0)


def test_add_noise_is_the_law_in_every_dtype() -> None:
    x0, eps = KEYS.normal("x0", (2, 3, 5)).double(), KEYS.normal("eps", (2, 3, 5)).double()
    level = vp_schedule_from_config(SD).level(
        torch.tensor([0.0, 1.0, 500.0, 999.0], dtype=torch.float64)
    )
    expected = torch.stack([level.alpha[i] * x0[i] + level.sigma[i] * eps[i] for i in range(4)])
    torch.testing.assert_close(add_noise(x0, eps, level), expected, rtol=0, atol=0)
    low = add_noise(x0.bfloat16(), eps.float(), NoiseLevel(*(row.float() for row in level)))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.double(),
        level.like(x0).alpha * x0.bfloat16() + level.like(x0).sigma * eps,
        rtol=2**-7,
        atol=1e-6,
    )


SHAPE = (3, 16, 12)


def test_plain_noise_is_white_and_shared() -> None:
    eps, used = sample_noise(KEYS, SHAPE)
    assert used is eps and torch.equal(eps, KEYS.normal("noise", SHAPE))


@pytest.mark.parametrize(("offset", "k"), [(0.1, 0.5), (0.1, -0.3), (0.02, 3.0)])
def test_an_adaptive_offset_is_kohyas(offset: float, k: float) -> None:
    """max(0, o + k |mean|) per image and channel (sd-scripts, apply_noise_offset)."""
    count = len(KEYS.names)
    x0 = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    x0 += torch.linspace(-2, 0.5, count).view(-1, 1, 1, 1)
    settings = NoiseSettings(offset=offset, adaptive_offset=k)
    eps, used = sample_noise(KEYS, SHAPE, settings, x0)
    strength = torch.zeros(count, SHAPE[0])
    for image, channel in itertools.product(range(count), range(SHAPE[0])):
        mean = float(x0[image, channel].double().mean())
        strength[image, channel] = max(0.0, offset + k * abs(mean))
    assert (strength == 0).any() == (k < 0)
    moved = eps - sample_noise(KEYS, SHAPE)[0]
    drawn = KEYS.normal("offset", (SHAPE[0], 1, 1)) * strength[..., None, None]
    torch.testing.assert_close(moved, drawn.expand_as(moved), atol=1e-6, rtol=1e-5)
    assert torch.equal(eps, used)
    alone = sample_noise(KEYS.rows(slice(1, 2)), SHAPE, settings, x0[1:2])[0]
    assert torch.equal(alone[0], eps[1])
    with pytest.raises(ValueError, match="a function of the latents"):
        sample_noise(KEYS, SHAPE, settings)


def test_offset_moves_whole_channels_of_target_and_input() -> None:
    eps, used = sample_noise(KEYS, SHAPE, NoiseSettings(offset=0.1))
    moved = eps - KEYS.normal("noise", SHAPE)
    assert used is eps and (moved.amax((2, 3)) - moved.amin((2, 3))).max() < 1e-6
    torch.testing.assert_close(
        moved[:, :, 0, 0], 0.1 * KEYS.normal("offset", (3, 1, 1))[:, :, 0, 0], atol=1e-6, rtol=0
    )


def test_perturbation_leaves_the_target_alone() -> None:
    eps, used = sample_noise(KEYS, SHAPE, NoiseSettings(perturbation=0.2))
    assert torch.equal(eps, KEYS.normal("noise", SHAPE))
    torch.testing.assert_close(
        (used - eps) / 0.2, KEYS.normal("perturbation", SHAPE), atol=1e-5, rtol=0
    )


def test_multires_is_unit_noise_with_low_frequencies_and_keyed_by_row() -> None:
    settings = NoiseSettings(
        offset=0.05, multires_levels=6, multires_discount=0.8, perturbation=0.1
    )
    eps, used = sample_noise(KEYS, SHAPE, settings)
    for i in range(4):
        alone = sample_noise(KEYS.rows(slice(i, i + 1)), SHAPE, settings)
        assert torch.equal(alone[0][0], eps[i]) and torch.equal(alone[1][0], used[i])
    plain, coarse = (
        sample_noise(many(64), SHAPE, NoiseSettings(multires_levels=n, multires_discount=0.8))[0]
        for n in (0, 6)
    )
    torch.testing.assert_close(coarse.std((1, 2, 3)), torch.ones(64), rtol=1e-5, atol=0)
    assert coarse.mean((2, 3)).std() > 3 * plain.mean((2, 3)).std()


@pytest.mark.parametrize(
    "bad",
    [{"offset": -1.0}, {"multires_levels": -1}, {"multires_discount": 0.0}, {"perturbation": -0.1}],
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=f"--noise.{next(iter(bad)).replace('_', '-')} is"):
        NoiseSettings(**bad)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"trained_betas": "0.1"}, "describes no noise schedule"),
        ({"trained_betas": [[0.1], [0.2]]}, "no shares between 0 and 1"),
        ({"trained_betas": [0.1, float("nan")]}, "no shares between 0 and 1"),
        ({"trained_betas": []}, "no shares between 0 and 1"),
        ({"beta_schedule": ["linear"]}, "describes no noise schedule"),
        ({"beta_start": "a"}, "describes no noise schedule"),
        ({"beta_end": 7}, "no shares between 0 and 1"),
        ({"num_train_timesteps": 10**12}, "expected 1 to 100,000"),
        ({"num_train_timesteps": 1000.0}, "expected 1 to 100,000"),
        ({"num_train_timesteps": 0}, "expected 1 to 100,000"),
    ],
)
def test_a_damaged_scheduler_config_is_refused(config, said) -> None:
    with pytest.raises(UserError, match=said):
        vp_schedule_from_config(config)
