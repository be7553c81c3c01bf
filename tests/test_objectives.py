"""One optimization step of each public script's objective, written out from its formulas, equals
ours to 1e-12 in float64.

The first half is the scripts: plain torch and diffusers, nothing of lora_core. The second half
composes our laws as train.training_step does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lora_core.diffusion import densities, losses, noise, prediction
from lora_core.diffusion.losses import StepOutput
from lora_core.diffusion.noise import NoiseLevel, RandomKeys, Schedule

B, C, H, W = 4, 3, 5, 6
RATE = 0.05
SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
TIMES = torch.tensor([3, 500, 60, 981])
VP, FLOW, EDM = noise.vp_schedule_from_config(SD), noise.flow_schedule(), noise.edm_schedule()


class Batch(NamedTuple):
    x: Tensor  # [b, c, h, w] clean latents
    n: Tensor  # [b, c, h, w] noise
    e: Tensor  # [b, 2] prompt embeddings


def batch() -> Batch:
    g = torch.Generator().manual_seed(11)
    x, n = torch.randn(2, B, C, H, W, generator=g, dtype=torch.float64)
    return Batch(x, n, torch.randn(B, 2, generator=g, dtype=torch.float64))


class Tiny(nn.Module):
    """A linear map over channels, of the latents, of the noise level that the network reads, and
    of the prompt.
    """

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(12)
        self.mix, self.time, self.text = (
            nn.Parameter(torch.randn(C, k, generator=g, dtype=torch.float64)) for k in (C, 2, 2)
        )

    def forward(self, x: Tensor, t: Tensor, e: Tensor) -> Tensor:
        time_input = torch.stack([torch.sin(t.double() / 100), torch.cos(3 * t.double())], -1)
        return (
            torch.einsum("oc,bchw->bohw", self.mix, x)
            + (time_input @ self.time.T + e @ self.text.T)[..., None, None]
        )


def stepped(loss_of: Callable[..., Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The parameters after one SGD step on loss_of(net, ...), from always the same start."""
    net = Tiny()
    loss_of(net, *args, **kwargs).backward()
    return {name: p.detach() - RATE * p.grad for name, p in net.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-12) for name in a)


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any((a[name] - b[name]).abs().max() > 1e-5 for name in a)


# ---------------------------------------------------------------- the scripts (semantics 2.5)


def column(v: Tensor) -> Tensor:
    return v.double().reshape(-1, 1, 1, 1)


def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def ddpm_rows(net: Tiny, data: Batch, t: Tensor, kind: str, e: Tensor | None = None) -> Tensor:
    """[b, c, h, w] squared errors of an epsilon or v network at DDPM's timesteps t."""
    bar = column(alphas_cumprod()[t])
    noisy = bar.sqrt() * data.x + (1 - bar).sqrt() * data.n
    target = data.n if kind == "epsilon" else bar.sqrt() * data.n - (1 - bar).sqrt() * data.x
    return (net(noisy, t, data.e if e is None else e) - target) ** 2


def ddpm(net: Tiny, data: Batch, t: Tensor, kind: str) -> Tensor:
    return ddpm_rows(net, data, t, kind).mean()


def min_snr(t: Tensor, kind: str, gamma: float = 5.0, *, wrong: bool = False) -> Tensor:
    snr = alphas_cumprod()[t] / (1 - alphas_cumprod()[t])
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    if kind == "epsilon":
        return least / snr
    return least / snr + 1 if wrong else least / (snr + 1)


def ddpm_weighted(net: Tiny, data: Batch, t: Tensor, kind: str, weights: Tensor) -> Tensor:
    return (ddpm_rows(net, data, t, kind).mean((1, 2, 3)) * weights).mean()


def ddpm_with_prior(
    net: Tiny,
    data: Batch,
    lam: tuple[float, float],
    e: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The prediction chunked in two: lam[0] mean over the instances + lam[1] mean over the class
    images.
    """
    rows = ddpm_rows(net, data, TIMES, "epsilon", e).mean((1, 2, 3)) * (
        torch.ones(B) if weights is None else weights
    )
    instance, prior = rows.chunk(2)
    return lam[0] * instance.mean() + lam[1] * prior.mean()


def edm_euler(net: Tiny, data: Batch, t: Tensor, kind: str, *, weigh: bool = True) -> Tensor:
    """EDM-style training of the SDXL scripts: EulerDiscreteScheduler's sigmas, looked up by the
    timestep's index.
    """
    sigmas = (
        ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt().flip(0)
    )  # as the scheduler keeps them, noisiest first
    timesteps = torch.arange(999, -1, -1)
    indices = [(timesteps == one).nonzero().item() for one in t]
    s = column(sigmas[indices])
    noisy = data.x + s * data.n
    out = net(noisy / (s**2 + 1) ** 0.5, t, data.e)
    x_hat = (
        noisy + out * -s
        if kind == "epsilon"
        else out * (-s / (s**2 + 1) ** 0.5) + noisy / (s**2 + 1)
    )
    return (s ** (-2.0 if weigh else 0.0) * (x_hat - data.x) ** 2).flatten(1).mean(1).mean()


def edm_playground(
    net: Tiny,
    data: Batch,
    sigma: Tensor,
    *,
    time_input: Callable[[Tensor], Tensor] = lambda s: 0.25 * torch.log(s),
    weights: Tensor | None = None,
) -> Tensor:
    """The same of a Playground v2.5 style model: EDMEulerScheduler's preconditioning,
    no weighting.
    """
    s, d = column(sigma), 0.5
    noisy = data.x + s * data.n
    out = net(noisy / (s**2 + d**2) ** 0.5, time_input(sigma), data.e)
    x_hat = d**2 / (s**2 + d**2) * noisy + s * d / (s**2 + d**2) ** 0.5 * out
    rows = ((x_hat - data.x) ** 2).flatten(1).mean(1)
    return (rows if weights is None else rows * weights).mean()


def flow_script(
    net: Tiny,
    data: Batch,
    u: Tensor,
    weighting: Callable[[Tensor], Tensor],
    *,
    ascending: bool = False,
    time_input: float = 1000.0,
) -> Tensor:
    """Flux and SD3 scripts: u indexes a table of timesteps that descends from 1000 to 1."""
    timesteps = torch.arange(1000, 0, -1, dtype=torch.float64)
    if ascending:
        timesteps = timesteps.flip(0)
    t = timesteps[(u * 1000).long()]
    s = column(t / 1000)
    noisy = (1 - s) * data.x + s * data.n
    out = net(noisy, t / time_input, data.e)
    return (weighting(s) * (out - (data.n - data.x)) ** 2).reshape(B, -1).mean(1).mean()


def masked(net: Tiny, data: Batch, m: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    return ((m * ddpm_rows(net, data, TIMES, "epsilon")).sum((1, 2, 3)) / norm(m)).mean()


# ---------------------------------------------------------------- ours, composed as in
# train.training_step


class Law(NamedTuple):
    schedule: Schedule
    row: str
    space: str = "model"
    weighting: str = "none"
    mask: Tensor | None = None
    gamma: float | None = None


def ours(
    net: Tiny,
    data: Batch,
    level: NoiseLevel,
    law: Law,
    is_prior: Tensor | None = None,
    prior_weight: float = 1.0,
) -> Tensor:
    x_t = noise.add_noise(data.x, data.n, level)
    out = net(prediction.scale_input(law.row, x_t, level), level.t, data.e)
    out, target, row = prediction.to_loss_space(law.row, law.space, out, data.x, data.n, level)
    is_prior = torch.zeros(len(data.x), dtype=torch.bool) if is_prior is None else is_prior
    record = StepOutput(
        out,
        target,
        data.x,
        data.n,
        x_t,
        level,
        row,
        law.mask,
        is_prior,
        0,
        {},
        law.schedule.t_max,
        law.row,
    )
    rows = losses.LOSSES["mse"](record)
    losses.check_loss_shape(rows, losses.mse, len(data.x))
    losses.check_loss_finite(rows, losses.mse)
    rows = rows * losses.loss_weights(
        law.weighting,
        level,
        law.row,
        space=law.space,
        **({} if law.gamma is None else {"gamma": law.gamma}),
    )
    return losses.sum_losses(
        rows, is_prior, prior_weight=prior_weight, instances=int((~is_prior).sum())
    )


class Told(NamedTuple):
    """Stands for the keyed numbers of a batch."""

    u: Tensor

    def uniform(self, purpose: str) -> Tensor:
        return self.u


def drawn(schedule: Schedule, u: Tensor, **how: Any) -> NoiseLevel:
    """What `noise.sample_levels` makes of numbers u, in float64 on the row that it drew."""
    t = noise.sample_levels(schedule, Told(u), **how).t.double()
    rows = (t[:, None] - schedule.ts).abs().argmin(1)
    assert (t - schedule.ts[rows]).abs().max() < 1e-6  # no shift here
    return schedule.level(schedule.ts[rows])


def at(times: Tensor) -> NoiseLevel:
    """The levels of vp at whole timesteps, drawn by the u that stand for them."""
    level = drawn(VP, (times + 0.5) / 1000)
    assert torch.equal(level.t, times.double())
    return level


# ---------------------------------------------------------------- each script's step

OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
PRIOR = torch.tensor([False, False, True, True])


def edm_levels() -> NoiseLevel:
    return drawn(EDM, torch.tensor([0.001, 0.4, 0.77, 0.999]))


@pytest.mark.parametrize("kind", OTHER)
def test_ddpm_objective(kind: str) -> None:
    theirs = stepped(ddpm, batch(), TIMES, kind)
    assert equal(stepped(ours, batch(), at(TIMES), Law(VP, kind)), theirs)
    assert differ(stepped(ours, batch(), at(TIMES), Law(VP, OTHER[kind])), theirs)


@pytest.mark.parametrize("gamma", [5.0, 1.0])
@pytest.mark.parametrize("kind", OTHER)
def test_min_snr_objective(kind: str, gamma: float) -> None:
    mine = stepped(ours, batch(), at(TIMES), Law(VP, kind, weighting="min_snr", gamma=gamma))
    assert equal(mine, stepped(ddpm_weighted, batch(), TIMES, kind, min_snr(TIMES, kind, gamma)))
    assert differ(mine, stepped(ddpm, batch(), TIMES, kind))


def test_prior_preservation_objective() -> None:
    mine = stepped(ours, batch(), at(TIMES), Law(VP, "epsilon"), PRIOR, 0.3)
    assert equal(mine, stepped(ddpm_with_prior, batch(), (1, 0.3)))


@pytest.mark.parametrize("kind", OTHER)
def test_edm_style_objective_of_discrete_networks(kind: str) -> None:
    """x_sigma / sqrt(sigma^2 + 1) is the x_t of vp, and the weighted x0 error is the network's own
    with another weight.
    """
    theirs = stepped(edm_euler, batch(), TIMES, kind)
    assert equal(stepped(ours, batch(), at(TIMES), Law(VP, kind, "edm")), theirs)
    assert equal(stepped(ours, batch(), at(TIMES), Law(VP, kind, "model", "snr")), theirs)
    plain = stepped(ddpm, batch(), TIMES, kind)
    assert equal(plain, theirs) if kind == "epsilon" else differ(plain, theirs)


def test_edm_objective_of_a_preconditioned_network() -> None:
    theirs = stepped(edm_playground, batch(), edm_levels().sigma)
    assert equal(stepped(ours, batch(), edm_levels(), Law(EDM, "edm", "edm")), theirs)
    assert differ(stepped(ours, batch(), edm_levels(), Law(EDM, "edm", "model")), theirs)


def test_the_levels_of_edm_span_the_schedulers_table() -> None:
    """diffusers' table has 1001 rows, of which scripts draw the noisiest 1000; ours has 1000, both
    ends included: less than a row apart.
    """
    table = pytest.importorskip("diffusers").EDMEulerScheduler().sigmas[:1000].double().flip(0)
    gap = ((table.log() - EDM.sigmas.log()) / EDM.sigmas.log().diff().max()).abs()
    assert gap.max() < 1 and EDM.sigmas[-1] == pytest.approx(table[-1].item())


def flow_levels(scheme: str, mean: float = 0.0, std: float = 1.0) -> tuple[Tensor, NoiseLevel]:
    """diffusers' own draw of u, and our levels for the same numbers in our direction."""
    training = pytest.importorskip("diffusers.training_utils")
    g = torch.Generator().manual_seed(21)
    u = training.compute_density_for_timestep_sampling(
        scheme, B, logit_mean=mean, logit_std=std, mode_scale=1.29, generator=g
    ).double()
    if scheme == "logit_normal":
        numbers, how = (
            torch.special.ndtr(-(torch.logit(u) - mean) / std),
            densities.bind_density("logit_normal", mean=-mean, std=std),
        )
    else:
        numbers = 1 - torch.rand(B, generator=torch.Generator().manual_seed(21)).double()
        how = (
            densities.bind_density("mode", scale=1.29)
            if scheme == "mode"
            else densities.bind_density("uniform")
        )
    return u, drawn(FLOW, numbers, density=how)


SCHEMES = [("none", 0.0, 1.0), ("sigma_sqrt", 0.0, 1.0), ("cosmap", 0.0, 1.0), ("mode", 0.0, 1.0)]
SCHEMES += [("logit_normal", mean, std) for mean, std in ((0.0, 1.0), (0.8, 0.5), (-1.0, 1.0))]


@pytest.mark.parametrize(("scheme", "mean", "std"), SCHEMES)
def test_flow_objective_of_each_weighting_scheme(scheme: str, mean: float, std: float) -> None:
    training = pytest.importorskip("diffusers.training_utils")
    u, level = flow_levels(scheme, mean, std)

    def weights(sigma: Tensor) -> Tensor:
        theirs = training.compute_loss_weighting_for_sd3(scheme, sigmas=sigma)
        if theirs.dtype == torch.float64:
            return theirs
        torch.testing.assert_close(
            theirs, (sigma**-2.0).float()
        )  # sigma_sqrt, which it casts to fp32
        return sigma**-2.0

    weighting = scheme if scheme in losses.WEIGHTINGS else "none"
    mine, theirs = (
        stepped(ours, batch(), level, Law(FLOW, "flow", weighting=weighting)),
        stepped(flow_script, batch(), u, weights),
    )
    assert equal(mine, theirs)
    if weighting != "none":
        assert differ(stepped(ours, batch(), level, Law(FLOW, "flow")), theirs)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_a_flow_law_is_the_same_in_the_space_of_x0(scheme: str) -> None:
    """Each weighting is one law in both spaces; none is not one: there it is snr, as for every
    network that is not of the edm row.
    """
    _, level = flow_levels(scheme)
    here, there = (
        stepped(ours, batch(), level, Law(FLOW, "flow", space, scheme))
        for space in ("model", "edm")
    )
    assert equal(here, there) if scheme != "none" else differ(here, there)
    assert equal(
        stepped(ours, batch(), level, Law(FLOW, "flow", "edm")),
        stepped(ours, batch(), level, Law(FLOW, "flow", "model", "snr")),
    )


# ---------------------------------------------------------------- traps of semantics 7, each next
# to the wrong formula


def test_trap_19_min_snr_of_v() -> None:
    mine = stepped(ours, batch(), at(TIMES), Law(VP, "v_prediction", weighting="min_snr"))
    right, wrong = (
        stepped(
            ddpm_weighted, batch(), TIMES, "v_prediction", min_snr(TIMES, "v_prediction", wrong=bad)
        )
        for bad in (False, True)
    )
    assert equal(mine, right) and differ(mine, wrong)


def test_trap_19_zero_terminal_snr_is_finite() -> None:
    last = noise.vp_schedule_from_config(SD | {"rescale_betas_zero_snr": True}).level(
        torch.tensor([999.0], dtype=torch.float64)
    )
    wrong = torch.minimum(last.snr, torch.full_like(last.snr, 5.0)) / last.snr
    assert wrong.isnan().all()
    assert (
        losses.loss_weights("min_snr", last, "epsilon").item() == 1
        and losses.loss_weights("min_snr", last, "v_prediction").item() == 0
    )


def test_trap_19_each_row_has_the_weight_of_its_own_timestep_with_prior_preservation() -> None:
    """Not that of the instance it is paired with. The scripts leave prior rows unweighted, which is
    another objective; ours weighs all alike.
    """
    mine = stepped(ours, batch(), at(TIMES), Law(VP, "epsilon", weighting="min_snr"), PRIOR, 0.3)
    weights = min_snr(TIMES, "epsilon")
    assert equal(mine, stepped(ddpm_with_prior, batch(), (1, 0.3), weights=weights))
    assert differ(mine, stepped(ddpm_with_prior, batch(), (1, 0.3), weights=weights[[0, 1, 0, 1]]))
    assert differ(
        mine, stepped(ddpm_with_prior, batch(), (1, 0.3), weights=torch.where(PRIOR, 1.0, weights))
    )


def test_trap_20_the_direction_of_logit_mean() -> None:
    """diffusers' +1 is a mean sigma of 0.30, ours is 0.70; a script's recipe is ours with the sign
    turned.
    """
    training = pytest.importorskip("diffusers.training_utils")
    many = RandomKeys(5, tuple(map(str, range(4000))), (0,) * 4000)
    u = training.compute_density_for_timestep_sampling(
        "logit_normal", 4000, 1.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    theirs = (torch.arange(1000, 0, -1) / 1000)[(u * 1000).long()].mean()
    turned, same = (
        noise.sample_levels(
            FLOW, many, density=densities.bind_density("logit_normal", mean=mean)
        ).sigma.mean()
        for mean in (-1.0, 1.0)
    )
    error = 4 * 0.2 / 4000**0.5  # of two means of 4000 numbers whose standard deviation is 0.2
    assert abs(theirs - 0.303) < error and abs(turned - 0.303) < error and abs(same - 0.697) < error
    numbers, level = flow_levels("logit_normal", 0.8, 0.5)
    mine = stepped(ours, batch(), level, Law(FLOW, "flow"))
    right, wrong = (
        stepped(flow_script, batch(), numbers, torch.ones_like, ascending=up)
        for up in (False, True)
    )
    assert equal(mine, right) and differ(mine, wrong)


def test_trap_20_sigma_keeps_its_precision_when_latents_are_bf16() -> None:
    level = noise.levels_at_quantiles(FLOW, (torch.arange(1000) + 0.5) / 1000)
    assert (
        level.sigma.dtype == torch.float32
        and level.sigma.unique().numel() == 1000
        and level.sigma.bfloat16().unique().numel() == 506
    )
    x, n = (
        torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(i)).bfloat16()
        for i in (1, 2)
    )
    s = column(level.sigma)
    exact = (1 - s) * x.double() + s * n.double()
    mine, wrong = noise.add_noise(x, n, level), (1 - s.bfloat16()) * x + s.bfloat16() * n
    assert mine.dtype == wrong.dtype == torch.bfloat16
    assert (mine != exact.bfloat16()).double().mean() < 2e-3  # one rounding; ties of fp32 aside
    assert (wrong.double() - exact).square().mean() > 2 * (mine.double() - exact).square().mean()


def test_trap_20_the_network_is_told_sigma() -> None:
    u, level = flow_levels("none")
    assert torch.equal(level.t, level.sigma)
    mine = stepped(ours, batch(), level, Law(FLOW, "flow"))
    right, wrong = (
        stepped(flow_script, batch(), u, torch.ones_like, time_input=by) for by in (1000.0, 1.0)
    )
    assert equal(mine, right) and differ(mine, wrong)


def test_trap_21_the_mask_weighs_once_and_is_normalised() -> None:
    """Right: sum(m e^2) / (c sum(m)). Wrong: m^2 (pred and target both times m), the mean over all
    pixels, 4 channels over one (Mix-of-Show).
    """
    m = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = stepped(ours, batch(), at(TIMES), Law(VP, "epsilon", mask=m))
    norms: dict[str, Callable[[Tensor], Tensor]] = {
        "right": lambda m: C * m.sum((1, 2, 3)),
        "all pixels": lambda m: torch.full((B,), float(C * H * W)),
        "one channel": lambda m: m.sum((1, 2, 3)),
    }
    assert equal(mine, stepped(masked, batch(), m, norms["right"]))
    assert differ(mine, stepped(masked, batch(), m**2, norms["right"]))
    assert differ(mine, stepped(masked, batch(), m, norms["all pixels"]))
    assert differ(mine, stepped(masked, batch(), m, norms["one channel"]))
    whole = stepped(ours, batch(), at(TIMES), Law(VP, "epsilon", mask=torch.ones(B, 1, H, W)))
    assert equal(whole, stepped(ddpm, batch(), TIMES, "epsilon"))


def test_trap_21_a_mask_is_resized_by_area() -> None:
    """The masked mean over pixels of an error that is constant on each latent is that over latents
    with the area-resized mask, not the nearest.
    """
    g = torch.Generator().manual_seed(4)
    pixels, error = (
        torch.rand(B, 1, 8 * H, 8 * W, generator=g).double(),
        torch.rand(B, C, H, W, generator=g).double(),
    )
    exact = losses.masked_mean(error.repeat_interleave(8, 2).repeat_interleave(8, 3), pixels)
    area, nearest = (
        losses.masked_mean(error, torch.nn.functional.interpolate(pixels, (H, W), mode=mode))
        for mode in ("area", "nearest")
    )
    torch.testing.assert_close(area, exact, rtol=1e-12, atol=0)
    assert (nearest - exact).abs().max() > 1e-3


@pytest.mark.parametrize("kind", OTHER)
def test_trap_22_discrete_networks_are_weighted_in_edm_space(kind: str) -> None:
    mine = stepped(ours, batch(), at(TIMES), Law(VP, kind, "edm"))
    right, wrong = (
        stepped(edm_euler, batch(), TIMES, kind, weigh=weigh) for weigh in (True, False)
    )
    assert equal(mine, right) and differ(mine, wrong)


def test_trap_22_preconditioned_networks_read_the_log_and_not_weighted() -> None:
    sigma, mine = edm_levels().sigma, stepped(ours, batch(), edm_levels(), Law(EDM, "edm", "edm"))
    assert equal(mine, stepped(edm_playground, batch(), sigma))
    assert differ(mine, stepped(edm_playground, batch(), sigma, time_input=lambda s: s))
    assert differ(mine, stepped(edm_playground, batch(), sigma, weights=sigma**-2.0))


@pytest.mark.parametrize(
    ("kind", "schedule"), [("epsilon", VP), ("v_prediction", VP), ("edm", EDM)]
)
def test_trap_22_min_snr_with_edm_is_the_law_that_public_scripts_refuse(
    kind: str, schedule: Schedule
) -> None:
    """min(snr, 5) |x0 error|^2, whatever the network predicts; for epsilon and v that is min-SNR
    itself.
    """
    level = at(TIMES) if schedule is VP else edm_levels()
    mine = stepped(ours, batch(), level, Law(schedule, kind, "edm", "min_snr"))
    if kind == "edm":
        right = stepped(
            edm_playground, batch(), level.sigma, weights=(level.sigma**-2.0).clamp(max=5.0)
        )
    else:
        right = stepped(ddpm_weighted, batch(), TIMES, kind, min_snr(TIMES, kind))
    assert equal(mine, right) and differ(
        mine, stepped(ours, batch(), level, Law(schedule, kind, "edm"))
    )
    assert losses.describe_loss("min_snr", kind, "edm").endswith("weighted by min(snr, 5)")


def test_trap_23_lambda_is_on_the_prior_rows_alone_wherever_they_are() -> None:
    data, order = batch(), [0, 2, 1, 3]  # i c i c
    right = stepped(ddpm_with_prior, data, (1, 0.3))
    wrong = [stepped(ddpm_with_prior, data, (0.3, 0.3)), stepped(ddpm_with_prior, data, (0.3, 1))]
    wrong.append(
        stepped(ddpm_with_prior, data, (1, 0.3), data.e[order])
    )  # embeddings i c i c next to pixels i i c c
    for rows, flags, times in (
        (data, PRIOR, TIMES),
        (Batch(*(v[order] for v in data)), PRIOR[order], TIMES[order]),
    ):
        mine = stepped(ours, rows, at(times), Law(VP, "epsilon"), flags, 0.3)
        assert equal(mine, right) and all(differ(mine, other) for other in wrong)


def test_trap_23_micro_batches_of_any_make_up_add_up_to_the_step() -> None:
    """Three prior rows and one instance, in halves: the sum is the step's own loss, which a mean of
    means is not.
    """
    flags, rows = (
        torch.tensor([True, False, True, True]),
        ddpm_rows(Tiny(), batch(), TIMES, "epsilon").mean((1, 2, 3)),
    )
    whole = ours(Tiny(), batch(), at(TIMES), Law(VP, "epsilon"), flags, 0.3)
    torch.testing.assert_close(whole, rows[1] + 0.3 * rows[flags].sum(), rtol=1e-12, atol=0)
    halves = [
        losses.sum_losses(rows[half], flags[half], prior_weight=0.3, instances=1)
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-12, atol=0)
    assert (rows.mean() - whole).abs() > 1e-3
