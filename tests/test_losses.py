"""Losses and weightings against the papers' formulas in float64; masks; what is refused, and by
what name.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core.diffusion.losses import (
    LOSSES,
    WEIGHTINGS,
    StepOutput,
    add_preservation,
    check_loss_finite,
    check_loss_shape,
    describe_loss,
    huber_delta,
    is_capturable,
    loss_weights,
    masked_mean,
    sum_losses,
)
from lora_core.diffusion.noise import (
    NoiseLevel,
    Schedule,
    add_noise,
    edm_schedule,
    flow_schedule,
    vp_schedule_from_config,
)
from lora_core.diffusion.prediction import PREDICTIONS, to_loss_space
from lora_core.errors import UserError
from lora_core.kernels import use_kernels
from lora_core.plugins import find_plugin

SD = vp_schedule_from_config(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
ZERO = vp_schedule_from_config(
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    }
)


# the other entries of LOSSES read attention: tests/test_attention_losses.py
OF_THE_OUTPUT = [name for name, loss in LOSSES.items() if not hasattr(loss, "reads_attention")]


def make(
    prediction: str = "epsilon",
    mask: Tensor | None = None,
    schedule: Schedule = SD,
    **lazy: Callable[[], Tensor],
) -> StepOutput:
    g = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, 4, 3, 5, 7, generator=g, dtype=torch.float64)
    level = schedule.level(schedule.ts[[0, 147, 500, 998]])
    target = PREDICTIONS[prediction].target(x0, eps, level)
    out = target + error * torch.tensor([0.01, 0.1, 1.0, 10.0]).double().reshape(-1, 1, 1, 1)
    prior = torch.tensor([False, False, True, True])
    return StepOutput(
        out,
        target,
        x0,
        eps,
        add_noise(x0, eps, level),
        level,
        prediction,
        mask,
        prior,
        3,
        dict(lazy),
        schedule.t_max,
    )


# ---------------------------------------------------------------- losses


def test_mse_and_l1_are_torchs_by_row() -> None:
    step = make()
    for name, oracle in (
        ("mse", torch.nn.functional.mse_loss),
        ("l1", torch.nn.functional.l1_loss),
    ):
        torch.testing.assert_close(
            LOSSES[name](step),
            torch.stack([oracle(o, t) for o, t in zip(step.out, step.target, strict=True)]),
        )


def kohya_c(t: float, sigma: float, c: float, schedule: str) -> float:
    """sd-scripts library/train_util.py, get_huber_threshold_if_needed, for one timestep,
    huber_scale = 1.
    """
    if schedule == "exponential":
        return math.exp(-(-math.log(c) / 1000) * t)
    return (1 - c) / (1 + sigma) ** 2 + c if schedule == "snr" else c


@pytest.mark.parametrize("schedule", ["constant", "snr", "exponential"])
@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
def test_huber_losses_are_kohyas_with_each_rows_own_timestep(name: str, schedule: str) -> None:
    step, rows = make(), []
    for i in range(4):
        c = kohya_c(
            step.level.t[i].item(),
            (step.level.sigma[i] / step.level.alpha[i]).item(),
            0.2,
            schedule,
        )
        d = step.out[i] - step.target[i]
        rows.append(((2 * c if name == "huber" else 2) * (torch.sqrt(d**2 + c**2) - c)).mean())
    torch.testing.assert_close(
        LOSSES[name](step, delta=0.2, schedule=schedule), torch.stack(rows), rtol=1e-9, atol=0
    )


def test_huber_is_mse_when_small_and_l1_when_large() -> None:
    step = make()
    torch.testing.assert_close(
        LOSSES["huber"](step, delta=1e4), LOSSES["mse"](step), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        LOSSES["smooth_l1"](step, delta=1e-9), 2 * LOSSES["l1"](step), rtol=1e-5, atol=0
    )


def test_huber_delta_runs_from_one_to_delta() -> None:
    ends = NoiseLevel(
        torch.tensor([0.0, 1000.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    )
    for schedule in ("exponential", "snr"):
        torch.testing.assert_close(
            huber_delta(ends, SD.t_max, delta=0.1, schedule=schedule), torch.tensor([1.0, 0.1])
        )
    ends = flow_schedule().level(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(
        huber_delta(ends, flow_schedule(steps=7).t_max, delta=0.1, schedule="exponential"),
        torch.tensor([1.0, 0.1]),
    )


@pytest.mark.parametrize("name", ["huber", "smooth_l1"])
def test_an_exponential_huber_schedule_fits_each_schedule_by_itself(name: str) -> None:
    """kohya's exp(t ln c / 1000), whose t of a flow is 1000 sigma."""
    for schedule, prediction, scale in ((SD, "epsilon", 1), (flow_schedule(), "flow", 1000)):
        step = make(prediction, schedule=schedule)
        d = step.out - step.target
        c = torch.tensor(
            [kohya_c(t * scale, 0.0, 0.2, "exponential") for t in step.level.t.tolist()],
            dtype=torch.float64,
        ).reshape(-1, 1, 1, 1)
        expected = ((2 * c if name == "huber" else 2) * ((d**2 + c**2).sqrt() - c)).mean((1, 2, 3))
        torch.testing.assert_close(
            LOSSES[name](step, delta=0.2, schedule="exponential"), expected, rtol=1e-9, atol=0
        )
    with pytest.raises(UserError, match=r"exponential schedule.*choose snr"):
        LOSSES[name](make("edm", schedule=edm_schedule()), schedule="exponential")


@pytest.mark.parametrize(
    ("args", "message"), [({"schedule": "cosine"}, "cosine"), ({"delta": 0.0}, "delta")]
)
def test_impossible_huber_arguments_are_refused(args: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LOSSES["huber"](make(), **args)


@pytest.mark.parametrize("name", OF_THE_OUTPUT)
def test_losses_are_fp32_rows_with_gradient_in_any_dtype(name: str) -> None:
    step = make()
    step.out, step.target = step.out.bfloat16().requires_grad_(), step.target.bfloat16()
    step.level = NoiseLevel(*(row.float() for row in step.level))
    rows = LOSSES[name](step)
    rows.sum().backward()
    assert (
        rows.shape == (4,)
        and rows.dtype == torch.float32
        and torch.isfinite(step.out.grad).all()
        and step.out.grad.abs().sum() > 0
    )
    step.out = step.target.clone().requires_grad_()
    LOSSES[name](step).sum().backward()
    assert (step.out.grad == 0).all()  # a perfect row neither moves nor turns NaN


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("name", OF_THE_OUTPUT)
def test_a_mask_of_ones_changes_nothing_and_a_binary_mask_is_the_mean_over_its_area(
    name: str,
) -> None:
    plain = make()
    torch.testing.assert_close(LOSSES[name](make(mask=torch.ones(4, 1, 5, 7))), LOSSES[name](plain))
    mask = torch.zeros(4, 1, 5, 7)
    mask[:, :, 1:4, 2:6] = 1
    inside = make()
    inside.out, inside.target = plain.out[:, :, 1:4, 2:6], plain.target[:, :, 1:4, 2:6]
    torch.testing.assert_close(LOSSES[name](make(mask=mask)), LOSSES[name](inside))
    torch.testing.assert_close(LOSSES[name](make(mask=mask / 2)), LOSSES[name](inside))


def test_a_soft_mask_weighs_by_its_value_and_an_empty_one_is_zero() -> None:
    error = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]).repeat(2, 1, 1, 1)  # [2, 2, 1, 2]
    mask = torch.tensor([[[[1.0, 0.25]]], [[[0.0, 0.0]]]])
    torch.testing.assert_close(
        masked_mean(error, mask), torch.tensor([(1 + 3 + 0.25 * (2 + 4)) / (2 * 1.25), 0.0])
    )


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 3, 5, 7), (1, 1, 5, 7)])
def test_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask"):
        LOSSES["mse"](make(mask=torch.ones(shape)))
    step = make()
    step.target = step.target[:, :1]
    with pytest.raises(ValueError, match=r"\[4, 3, 5, 7\].*\[4, 1, 5, 7\]"):
        LOSSES["mse"](step)


# ---------------------------------------------------------------- weightings

# (weighting, prediction) -> weight of the squared output error, from snr and sigma, as printed in
# the papers
PAPERS = {
    ("min_snr", "epsilon"): lambda s, sigma: torch.minimum(s, torch.full_like(s, 5)) / s,
    ("min_snr", "v_prediction"): lambda s, sigma: torch.minimum(s, torch.full_like(s, 5)) / (s + 1),
    ("min_snr", "sample"): lambda s, sigma: torch.minimum(s, torch.full_like(s, 5)),
    ("min_snr", "flow"): lambda s, sigma: torch.minimum(s, torch.full_like(s, 5)) * sigma**2,
    ("soft_min_snr", "sample"): lambda s, sigma: (
        1 / (1 / s + 1 / 5)
    ),  # 1 / (sigma^2 + 1 / gamma) with alpha = 1
    ("soft_min_snr", "epsilon"): lambda s, sigma: 1 / (1 / s + 1 / 5) / s,
    ("soft_min_snr", "v_prediction"): lambda s, sigma: 1 / (1 / s + 1 / 5) / (s + 1),
    ("soft_min_snr", "flow"): lambda s, sigma: 1 / (1 / s + 1 / 5) * sigma**2,
    ("debiased", "epsilon"): lambda s, sigma: 1 / s.sqrt(),
    ("debiased", "v_prediction"): lambda s, sigma: s.sqrt() / (s + 1),
    ("debiased", "flow"): lambda s, sigma: s.sqrt() * sigma**2,
    ("p2", "epsilon"): lambda s, sigma: 1 / (1 + s),
    ("p2", "v_prediction"): lambda s, sigma: s / (1 + s) ** 2,
    ("p2", "flow"): lambda s, sigma: s / (1 + s) * sigma**2,
}


@pytest.mark.parametrize(("name", "prediction"), PAPERS)
def test_weights_are_the_papers(name: str, prediction: str) -> None:
    schedule = flow_schedule() if prediction == "flow" else SD
    rows = slice(0, -1) if prediction == "flow" else slice(None)  # the last row of a flow has snr 0
    level = schedule.level(schedule.ts[rows])
    snr = (schedule.alphas[rows] / schedule.sigmas[rows]) ** 2
    torch.testing.assert_close(
        loss_weights(name, level, prediction),
        PAPERS[name, prediction](snr, schedule.sigmas[rows]),
        rtol=1e-9,
        atol=0,
    )


def test_the_weights_diffusers_and_kohya_agree_on() -> None:
    """semantics: at snr 10 and gamma 5 epsilon weighs 1/2 and v 5/11."""
    level = NoiseLevel(
        torch.tensor([0.0]), torch.tensor([(10 / 11) ** 0.5]), torch.tensor([(1 / 11) ** 0.5])
    )
    torch.testing.assert_close(
        loss_weights("min_snr", level, "epsilon", gamma=5.0), torch.tensor([0.5])
    )
    torch.testing.assert_close(
        loss_weights("min_snr", level, "v_prediction", gamma=5.0), torch.tensor([5 / 11])
    )
    training = pytest.importorskip("diffusers.training_utils")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    t = torch.arange(1000)
    snr = training.compute_snr(scheduler, t)
    torch.testing.assert_close(
        loss_weights("min_snr", SD.level(t), "epsilon"), snr.clamp(max=5) / snr, rtol=1e-3, atol=0
    )  # theirs is an fp32 cumprod
    torch.testing.assert_close(
        loss_weights("min_snr", SD.level(t), "v_prediction"),
        snr.clamp(max=5) / (snr + 1),
        rtol=1e-3,
        atol=0,
    )


def test_arguments_of_the_weightings() -> None:
    level = SD.level(torch.tensor([200.0], dtype=torch.float64))
    s = level.snr
    torch.testing.assert_close(
        loss_weights("p2", level, "epsilon", k=2.0, gamma=0.5), (2 + s) ** -0.5
    )
    torch.testing.assert_close(
        loss_weights("soft_min_snr", level, "sample", gamma=4.0), 4 * s / (4 + s)
    )


@pytest.mark.parametrize("name", [n for n in WEIGHTINGS if n != "none"])
def test_a_weighted_error_in_x0_does_not_care_what_the_network_predicts(name: str) -> None:
    """weight * (output error)^2 is W(snr) * (x0 error)^2 for every row of PREDICTIONS."""
    level = SD.level(torch.arange(0, 1000, 37).double())
    rows = [loss_weights(name, level, p) / PREDICTIONS[p].jacobian(level) ** 2 for p in PREDICTIONS]
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_stay_finite_at_zero_terminal_snr_and_at_the_ends_of_flow(
    name: str, prediction: str
) -> None:
    for level in (
        ZERO.level(torch.arange(1000)),
        flow_schedule().level(torch.tensor([0.0, 0.5, 1.0])),
    ):
        w = loss_weights(name, level, prediction)
        assert (
            torch.isfinite(w).all()
            and (w >= 0).all()
            and w.dtype == torch.float32
            and w.shape == level.t.shape
        )
    if name == "none":
        assert (w == 1).all()


def test_min_snr_at_zero_terminal_snr_is_its_limit() -> None:
    last = ZERO.level(torch.tensor([999]))
    torch.testing.assert_close(loss_weights("min_snr", last, "epsilon"), torch.ones(1))
    torch.testing.assert_close(
        loss_weights("min_snr", last, "v_prediction"), torch.zeros(1), atol=1e-6, rtol=0
    )


# ---------------------------------------------------------------- names, rows


def test_resolve_finds_rows_and_files_and_binds_arguments(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def cube(step, power=3):\n    return (step.out - step.target).abs().pow(power).mean((1, "
        "2, 3))\n\nnumber = 1\n"
    )
    step = make()
    assert find_plugin("l1", LOSSES, "loss") is LOSSES["l1"]
    torch.testing.assert_close(
        find_plugin(f"{file}:cube", LOSSES, "loss", {"power": 2})(step), LOSSES["mse"](step)
    )
    torch.testing.assert_close(
        find_plugin("huber", LOSSES, "loss", {"delta": 0.3})(step), LOSSES["huber"](step, delta=0.3)
    )
    for spec, args, message in [
        ("hubert", None, "'hubert'.*nearest is 'huber'"),
        (f"{tmp_path}/none.py:cube", None, "none.py:cube names no Python file"),
        (f"{file}:square", None, "no function 'square'"),
        (f"{file}:number", None, "no function 'number'"),
        ("huber", {"gamma": 1}, "'gamma'.*delta, schedule"),
        (f"{file}:cube", {"step": 1}, "'step'.*takes power"),
    ]:
        with pytest.raises(UserError, match=message):
            find_plugin(spec, LOSSES, "loss", args)


@pytest.mark.parametrize("name", ["min_sn", "none"])
def test_a_wrong_weighting_or_argument_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        loss_weights(name, SD.level(torch.tensor([1])), "epsilon", gama=5.0)


def mine(step: StepOutput) -> Tensor:
    """A loss, for error messages that name it."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor(1.0), "loss mine returned a scalar"),
        (torch.ones(1), r"loss mine returned shape \[1\], expected \[2\]"),
        (torch.ones(2, 1), r"loss mine returned shape \[2, 1\]"),
        (torch.tensor([1.0, math.nan]), "loss mine returned nan for row 1"),
        (torch.tensor([-math.inf, 1.0]), "loss mine returned -inf for row 0"),
        (1.0, "loss mine returned float"),
    ],
)
def test_what_is_not_a_row_per_example_is_refused_by_name(rows: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_loss_shape(rows, mine, 2)
        check_loss_finite(rows, mine)
    good = torch.ones(2, requires_grad=True)
    check_loss_shape(good, mine, 2)
    check_loss_finite(good, mine)


def test_total_is_dreambooths_sum_and_micro_batches_add_up() -> None:
    rows = torch.rand(8, dtype=torch.float64)
    prior = torch.arange(8) >= 4
    whole = sum_losses(rows, prior, prior_weight=0.3, instances=4)
    torch.testing.assert_close(whole, rows[:4].mean() + 0.3 * rows[4:].mean())
    parts = [sum_losses(rows[i::3], prior[i::3], prior_weight=0.3, instances=4) for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)


def test_a_loss_file_with_a_mistake_is_one_sentence(tmp_path):
    (tmp_path / "broken.py").write_text("def loss(step) return 1")
    with pytest.raises(UserError, match=r"broken\.py cannot be run: SyntaxError"):
        find_plugin(f"{tmp_path / 'broken.py'}:loss", LOSSES, "loss")


# ---------------------------------------------------------------- spaces


# what diffusers' 1 / sigma^2 of the x0 error is on each row, from alpha^2 of vp or sigma of flow
SNR_WEIGHTED = {
    "epsilon": lambda level: torch.ones_like(level.sigma),
    "v_prediction": lambda level: level.alpha**2,
    "sample": lambda level: level.snr,
    "flow": lambda level: level.alpha**2,
}


@pytest.mark.parametrize("prediction", SNR_WEIGHTED)
def test_snr_in_edm_space_is_the_published_weight_in_the_networks_own(prediction: str) -> None:
    """EDM-style training of an epsilon network is epsilon's squared error; of a v network alpha^2
    times v's.
    """
    schedule = flow_schedule(steps=1001) if prediction == "flow" else SD
    level = schedule.level(schedule.ts[[0, 147, 500, 998]])
    torch.testing.assert_close(
        loss_weights("snr", level, prediction), SNR_WEIGHTED[prediction](level), rtol=1e-9, atol=0
    )
    step = make(prediction, schedule=schedule)
    out, target, row = to_loss_space(prediction, "edm", step.out, step.x0, step.eps, step.level)
    there = (out - target).square().mean((1, 2, 3)) * loss_weights(
        "none", step.level, prediction, space="edm"
    )
    torch.testing.assert_close(
        there, LOSSES["mse"](step) * SNR_WEIGHTED[prediction](step.level), rtol=1e-6, atol=0
    )
    assert row == "sample"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [n for n in WEIGHTINGS if n != "none"])
def test_a_weighting_computes_the_same_in_both_spaces(name: str, prediction: str) -> None:
    schedule = {"flow": flow_schedule(steps=1001), "edm": edm_schedule()}.get(prediction, SD)
    step = make(prediction, schedule=schedule)
    rows = []
    for space in ("model", "edm"):
        out, target, _ = to_loss_space(prediction, space, step.out, step.x0, step.eps, step.level)
        rows.append(
            (out - target).square().mean((1, 2, 3))
            * loss_weights(name, step.level, prediction, space=space)
        )
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=0)


def test_a_network_of_the_edm_row_is_not_weighted_in_edm_space() -> None:
    level = edm_schedule().level(edm_schedule().ts[::100])
    assert (loss_weights("none", level, "edm", space="edm") == 1).all()
    torch.testing.assert_close(
        loss_weights("min_snr", level, "edm", space="edm"), level.snr.clamp(max=5)
    )
    torch.testing.assert_close(loss_weights("none", level, "epsilon", space="edm"), level.sigma**-2)


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_the_weighting_schemes_of_flow_are_diffusers(scheme: str) -> None:
    training = pytest.importorskip("diffusers.training_utils")
    level = flow_schedule().level(flow_schedule().ts)
    theirs = training.compute_loss_weighting_for_sd3(scheme, sigmas=level.sigma).double()
    torch.testing.assert_close(
        loss_weights(scheme, level, "flow"), theirs, rtol=1e-6, atol=0
    )  # theirs is cast to fp32
    assert (
        loss_weights(scheme, level, "flow")[-1].item()
        == {"sigma_sqrt": 1.0, "cosmap": pytest.approx(2 / math.pi)}[scheme]
    )  # at pure noise too


@pytest.mark.parametrize(
    ("words", "args"),
    [
        ("loss: mse of epsilon, not weighted", ("none", "epsilon")),
        ("loss: mse of v, weighted by min(snr, 5) / (snr + 1)", ("min_snr", "v_prediction")),
        (
            "loss: mse of x0, read from epsilon, weighted by snr = 1 / sigma^2",
            ("none", "epsilon", "edm"),
        ),
        (
            "loss: mse of x0, read from EDM's preconditioned output, not weighted",
            ("none", "edm", "edm"),
        ),
        (
            "loss: mse of x0, read from EDM's preconditioned output, weighted by min(snr, 5)",
            ("min_snr", "edm", "edm"),
        ),
        (
            "loss: mse of the velocity eps - x0, weighted by snr / (1 + snr)^1 sigma^2",
            ("p2", "flow"),
        ),
    ],
)
def test_a_run_says_what_its_loss_computes(words: str, args: tuple[str, ...]) -> None:
    assert describe_loss(*args) == words


def test_the_words_know_arguments_files_and_every_row(tmp_path: Path) -> None:
    assert (
        describe_loss("min_snr", "sample", gamma=3.0, loss="huber")
        == "loss: huber of x0, weighted by min(snr, 3)"
    )
    (tmp_path / "mine.py").write_text("def half(snr): return snr / 2")
    assert describe_loss(f"{tmp_path}/mine.py:half", "flow").endswith("mine.py:half of snr sigma^2")
    with pytest.raises(UserError, match="min_sn"):
        describe_loss("min_sn", "epsilon")
    for name in WEIGHTINGS:
        for prediction in PREDICTIONS:
            assert "{" not in describe_loss(name, prediction) and describe_loss(
                name, prediction, "edm"
            ).startswith("loss: mse of x0")


# ---------------------------------------------------------------- preserving the base model's
# output


def test_preserving_adds_the_squared_difference_to_the_base_without_its_gradient() -> None:
    now, before = (
        torch.randn(4, 3, 5, 7, requires_grad=True),
        torch.randn(4, 3, 5, 7, requires_grad=True),
    )
    step = make(mask=torch.zeros(4, 1, 5, 7), preserved=lambda: (now, before))
    rows = add_preservation(LOSSES["mse"], 0.3)(step)
    torch.testing.assert_close(
        rows, 0.3 * (now - before).square().mean((1, 2, 3)).double(), check_dtype=False
    )  # the mask hides mse, not this
    rows.sum().backward()
    torch.testing.assert_close(now.grad, 0.3 * 2 * (now - before).detach() / 105)
    assert before.grad is None
    with pytest.raises(UserError, match=r"step\.preserved"):
        add_preservation(LOSSES["mse"], 0.3)(make())


def test_outputs_of_the_base_model_are_read_in_the_space_of_the_loss() -> None:
    raw = make("v_prediction")
    out, target, row = to_loss_space("v_prediction", "edm", raw.out, raw.x0, raw.eps, raw.level)
    other = raw.out * 0.9
    step = make(row, base_out=lambda: other, preserved=lambda: (raw.out, other))
    step.out, step.target, step.network = out, target, "v_prediction"
    expected = PREDICTIONS["v_prediction"].x0(raw.x_t, other, raw.level)
    torch.testing.assert_close(step.base_out, expected, rtol=0, atol=0)
    torch.testing.assert_close(step.preserved, (out, expected), rtol=0, atol=0)
    plain = make("v_prediction", base_out=lambda: other)
    assert plain.base_out is other


# ---------------------------------------------------------------- what a CUDA graph can hold


def test_built_in_losses_are_capturable_and_a_users_where_it_says_so() -> None:
    assert all(is_capturable(loss) for loss in LOSSES.values())
    assert is_capturable(find_plugin("huber", LOSSES, "loss", {"delta": 0.5})) and is_capturable(
        add_preservation(LOSSES["mse"], 0.5)
    )

    def mine(step: StepOutput, *, k: float = 1.0) -> Tensor:
        return k * LOSSES["l1"](step)

    assert not is_capturable(mine) and not is_capturable(add_preservation(mine, 1.0))
    mine.capturable = True  # type: ignore[attr-defined]
    assert (
        is_capturable(mine)
        and is_capturable(functools.partial(mine, k=2.0))
        and is_capturable(add_preservation(functools.partial(mine, k=2.0), 1.0))
    )


@pytest.mark.parametrize("mode", ["reference", "fused"])
def test_mse_is_one_op_in_every_mode_with_the_same_errors(mode: str) -> None:
    step = make(
        mask=(torch.rand(4, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4).double()
    )
    with use_kernels(mode):
        torch.testing.assert_close(
            LOSSES["mse"](step), masked_mean((step.out - step.target) ** 2, step.mask)
        )
        step.mask = torch.ones(4, 1, 2, 2)
        with pytest.raises(ValueError, match="resize it to the latents"):
            LOSSES["mse"](step)
        step.target = step.target[:, :, 1:]
        with pytest.raises(ValueError, match="the network returned"):
            LOSSES["mse"](step)
