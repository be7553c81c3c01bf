"""Predictions: x0 comes back from the target, the Jacobian is autograd's, the rows agree with each
other; all in float64.
"""

import pytest
import torch

from lora_core.diffusion.noise import (
    NoiseLevel,
    add_noise,
    edm_schedule,
    flow_schedule,
    vp_schedule_from_config,
)
from lora_core.diffusion.prediction import (
    PREDICTIONS,
    SIGMA_DATA,
    eps_from_x0,
    prediction_from_config,
    scale_input,
    to_loss_space,
)
from lora_core.errors import UserError

SCHEDULES = {
    "vp": vp_schedule_from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ),
    "zero_snr": vp_schedule_from_config({"rescale_betas_zero_snr": True}),
    "flow": flow_schedule(shift=3.0),
    "edm": edm_schedule(),
}
ROWS = [0, 1, 333, 731, 997]


def batch(schedule: str) -> tuple[torch.Tensor, torch.Tensor, NoiseLevel, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, 1, generator=g, dtype=torch.float64)
    level = SCHEDULES[schedule].level(SCHEDULES[schedule].ts[ROWS])
    return x0, eps, level, add_noise(x0, eps, level)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_target_read_back_is_x0(name: str, schedule: str) -> None:
    x0, eps, level, x_t = batch(schedule)
    row = PREDICTIONS[name]
    torch.testing.assert_close(
        row.x0(x_t, row.target(x0, eps, level), level), x0, rtol=0, atol=1e-11
    )
    torch.testing.assert_close(eps_from_x0(x_t, x0, level), eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_jacobian_is_autograds(name: str, schedule: str) -> None:
    _, eps, level, x_t = batch(schedule)
    out = eps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(PREDICTIONS[name].x0(x_t, out, level).sum(), out)
    torch.testing.assert_close(
        grad.abs(),
        PREDICTIONS[name].jacobian(level).reshape(-1, 1, 1, 1).expand_as(grad),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_error_in_x0_is_each_rows_error_over_its_jacobian(schedule: str) -> None:
    """All rows describe one network: if its x0 is off by d, its output is off by d / jacobian
    whatever it predicts.
    """
    x0, eps, level, x_t = batch(schedule)
    off = x0 + 0.1
    eps_off = eps_from_x0(x_t, off, level)
    for name, row in PREDICTIONS.items():
        error = (row.target(off, eps_off, level) - row.target(x0, eps, level)).abs()
        expected = (0.1 / row.jacobian(level)).reshape(-1, 1, 1, 1).expand_as(error)
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-9, msg=name)


def test_rows_are_the_papers_on_their_own_schedules() -> None:
    x0, eps, level, x_t = batch("vp")
    a, s = level.alpha.reshape(-1, 1, 1, 1), level.sigma.reshape(-1, 1, 1, 1)
    v = a * eps - s * x0
    torch.testing.assert_close(
        PREDICTIONS["v_prediction"].target(x0, eps, level), v, rtol=0, atol=0
    )
    torch.testing.assert_close(PREDICTIONS["v_prediction"].x0(x_t, v, level), a * x_t - s * v)
    torch.testing.assert_close(PREDICTIONS["v_prediction"].jacobian(level), level.sigma)
    torch.testing.assert_close(PREDICTIONS["epsilon"].x0(x_t, eps, level), (x_t - s * eps) / a)
    x0, eps, level, x_t = batch("flow")
    torch.testing.assert_close(
        PREDICTIONS["flow"].x0(x_t, eps - x0, level), x_t - level.like(x0).sigma * (eps - x0)
    )
    torch.testing.assert_close(PREDICTIONS["flow"].jacobian(level), level.sigma)


def test_edm_is_the_papers_preconditioning() -> None:
    x0, eps, level, x_t = batch("edm")
    row, s, d = PREDICTIONS["edm"], level.like(x0).sigma, 0.5
    c_skip, c_out, c_in = (
        d**2 / (s**2 + d**2),
        s * d / (s**2 + d**2).sqrt(),
        1 / (s**2 + d**2).sqrt(),
    )
    out = torch.cos(eps)
    torch.testing.assert_close(row.x0(x_t, out, level), c_skip * x_t + c_out * out)
    torch.testing.assert_close(
        row.target(x0, eps, level), (x0 - c_skip * x_t) / c_out, rtol=1e-5, atol=1e-9
    )
    torch.testing.assert_close(row.c_in(level), c_in.flatten())
    torch.testing.assert_close(row.jacobian(level), c_out.flatten())
    assert d == SIGMA_DATA


def test_edm_reads_as_diffusers_does() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    _, eps, level, x_t = batch("edm")
    for i, sigma in enumerate(level.sigma):
        theirs = scheduler.precondition_outputs(x_t[i : i + 1], eps[i : i + 1], sigma)
        ours = PREDICTIONS["edm"].x0(x_t[i : i + 1], eps[i : i + 1], level.rows(slice(i, i + 1)))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_edm_with_unit_data_on_vp_is_minus_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_core.diffusion.prediction.SIGMA_DATA", 1.0)
    x0, eps, level, _ = batch("vp")
    torch.testing.assert_close(
        PREDICTIONS["edm"].target(x0, eps, level),
        -PREDICTIONS["v_prediction"].target(x0, eps, level),
    )


@pytest.mark.parametrize("name", PREDICTIONS)
def test_half_precision_outputs_are_read_in_fp32(name: str) -> None:
    x0, eps, level, x_t = batch("flow")
    level = NoiseLevel(*(row.float() for row in level))
    row = PREDICTIONS[name]
    assert row.target(x0.bfloat16(), eps.bfloat16(), level).dtype == torch.float32
    read = row.x0(x_t.bfloat16(), eps.bfloat16(), level)
    assert read.dtype == torch.float32
    torch.testing.assert_close(
        read, row.x0(x_t.bfloat16().float(), eps.bfloat16().float(), level), rtol=0, atol=0
    )


# ---------------------------------------------------------------- what the network is shown, and
# where it is compared


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_input_is_scaled_by_c_in_in_its_own_dtype(name: str) -> None:
    _, _, level, x_t = batch("edm")
    scaled = scale_input(name, x_t, level)
    torch.testing.assert_close(
        scaled, PREDICTIONS[name].c_in(level).reshape(-1, 1, 1, 1) * x_t, rtol=1e-14, atol=0
    )
    assert (scaled is x_t) == (name != "edm")
    low = scale_input(name, x_t.bfloat16(), NoiseLevel(*(row.float() for row in level)))
    assert low.dtype == torch.bfloat16
    wide = PREDICTIONS[name].c_in(level).reshape(-1, 1, 1, 1) * x_t.bfloat16().double()
    torch.testing.assert_close(low.double(), wide, rtol=2**-8, atol=0)  # one rounding


def test_the_scaled_input_has_about_unit_variance_at_any_noise() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 64, 64, generator=g, dtype=torch.float64)
    level = SCHEDULES["edm"].level(SCHEDULES["edm"].ts[ROWS])
    shown = scale_input("edm", add_noise(x0 * SIGMA_DATA, eps, level), level)
    torch.testing.assert_close(shown.var((1, 2, 3)), torch.ones(5).double(), rtol=0.06, atol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["vp", "flow", "edm"])
def test_an_error_in_edm_space_is_the_networks_error_times_the_jacobian(
    name: str, schedule: str
) -> None:
    """Also for a network that saw perturbed noise: the error does not know about it."""
    x0, eps, level, _ = batch(schedule)
    out = PREDICTIONS[name].target(x0, eps, level) + torch.cos(eps)
    mine, target, row = to_loss_space(name, "model", out, x0, eps, level)
    assert mine is out and row == name
    read, clean, row = to_loss_space(name, "edm", out, x0, eps, level)
    assert row == "sample" and torch.equal(clean, x0)
    expected = (mine - target).abs() * PREDICTIONS[name].jacobian(level).reshape(-1, 1, 1, 1)
    torch.testing.assert_close((read - clean).abs(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [None, "v", "epsilon ", ["epsilon"], 1, {"a": 1}])
def test_an_unknown_prediction_type_is_refused(name) -> None:
    with pytest.raises(UserError, match="this program knows epsilon, v_prediction"):
        prediction_from_config({"prediction_type": name})


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_known_prediction_type_is_read(name) -> None:
    assert prediction_from_config({"prediction_type": name}) == name
    assert prediction_from_config({}) == "epsilon"
