"""The preview of noise levels: shares against the distribution functions of the densities, and
the plot.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_core.diffusion import densities, noise, validation
from lora_core.diffusion.noise import RandomKeys
from lora_core.runs import pictures, reports
from lora_core.runs.pictures import TrainingLook
from lora_core.runs.reports import Objective, preview_density, preview_table, timestep_bins
from tests.report_runs import write_jsonl, write_run

VP = noise.vp_schedule_from_config(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
FLOW, EDM = noise.flow_schedule(), noise.edm_schedule()


def normal(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def test_uniform_draws_are_the_same_in_every_bin_and_none_below_low() -> None:
    for schedule, row in ((VP, "epsilon"), (FLOW, "flow")):
        torch.testing.assert_close(
            timestep_bins(Objective(schedule, row), 10).share,
            torch.full((10,), 0.1, dtype=torch.float64),
            rtol=0,
            atol=1e-9,
        )
        part = timestep_bins(Objective(schedule, row, low=0.2, high=0.7), 10)
        torch.testing.assert_close(
            part.share, torch.tensor([0, 0, 1, 1, 1, 1, 1, 0, 0, 0]).double() / 5, rtol=0, atol=1e-9
        )
        assert part.level.snr.diff().max() < 0  # from clean to noise


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shares_of_a_logit_normal_are_differences_of_its_distribution_function(
    mean: float, std: float, shift: float
) -> None:
    """logit(shifted(s)) = logit(s) + ln shift: a shifted logit-normal is one with another mean."""
    b = timestep_bins(
        Objective(
            FLOW, "flow", densities.bind_density("logit_normal", mean=mean, std=std), shift=shift
        ),
        10,
    )
    edges = torch.special.logit(torch.linspace(0, 1, 11, dtype=torch.float64))
    expected = normal((edges - mean - math.log(shift)) / std).diff()
    torch.testing.assert_close(
        b.share, expected, rtol=0, atol=2e-5 if shift == 1 else 5e-3
    )  # a shifted row may lie on either side of an edge
    assert (b.share[:5].sum() < b.share[5:].sum()) == (mean + math.log(shift) > 0)


def test_shares_are_what_training_draws() -> None:
    o = Objective(FLOW, "flow", densities.bind_density("mode", scale=0.8), low=0.1, shift=2.0)
    keys = RandomKeys(1, tuple(map(str, range(4000))), (0,) * 4000)
    t = noise.sample_levels(FLOW, keys, low=0.1, density=o.density, shift=2.0).t
    share = timestep_bins(o, 10).share
    counts = torch.bincount((t * 10 - 1e-4).long().clamp(0, 9), minlength=10) / 4000
    assert ((counts - share).abs() <= 4 * (share * (1 - share) / 4000).sqrt() + 1e-9).all()


def test_the_product_is_the_share_of_the_weights() -> None:
    b = timestep_bins(Objective(VP, "epsilon", weighting="min_snr", args={"gamma": 3.0}), 20)
    snr = VP.level(torch.arange(1000.0).double()).snr
    weights = (snr.clamp(max=3) / snr).reshape(20, 50).sum(1)
    torch.testing.assert_close(b.product, weights / weights.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        b.weight, (b.level.snr.clamp(max=3) / b.level.snr), rtol=1e-9, atol=0
    )
    here, there = (
        timestep_bins(Objective(FLOW, "flow", space=space, weighting="cosmap"), 10)
        for space in ("model", "edm")
    )
    torch.testing.assert_close(there.weight * FLOW.level(there.t).sigma ** 2, here.weight)


@pytest.mark.parametrize(
    ("schedule", "row"),
    [
        (VP, "v_prediction"),
        (FLOW, "flow"),
        (EDM, "edm"),
        (noise.vp_schedule(torch.full((7,), 0.1)), "epsilon"),
    ],
)
def test_ten_rows_from_clean_to_noise(schedule: noise.Schedule, row: str) -> None:
    lines = preview_table(Objective(schedule, row)).splitlines()
    assert len(lines) == 11 and lines[0].endswith("from clean to pure noise")
    sigmas = [float(line.split()[1]) for line in lines[1:]]
    assert sigmas == sorted(sigmas) and sum(
        float(line.split()[3].rstrip("%")) for line in lines[1:]
    ) == pytest.approx(100, abs=0.6)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt"])
def test_the_preview_is_a_picture_and_says_what_the_loss_is(
    weighting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    o = Objective(
        FLOW,
        "flow",
        densities.bind_density("logit_normal", mean=1.0),
        shift=1.8,
        weighting=weighting,
        loss="huber",
    )
    file = preview_density(o, tmp_path / "density.png")
    said = capsys.readouterr().out
    assert said.startswith("loss: huber of the velocity eps - x0, ") and preview_table(o) in said
    with Image.open(file) as image:
        assert (
            image.size == (960, 540)
            and len(set(image.convert("RGB").resize((96, 54)).tobytes())) > 20
        )
    assert [p.name for p in tmp_path.iterdir()] == ["density.png"]


def test_timesteps_are_written_as_their_schedule_counts_them() -> None:
    assert [validation.format_timestep(t) for t in (625.0, 0.625, -1.55, 1.096, math.nan)] == [
        "625",
        "0.625",
        "-1.550",
        "1.096",
        "all",
    ]


def test_the_plot_says_which_images_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "val_loss": 0.5 - i / 10}) + "\n" for i in range(3))
    )
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        pictures,
        "plot_lines",
        lambda series, path, *, axes, title: seen.update(series=list(series), title=title),
    )
    reports.plot_metrics(tmp_path, "loss on the training images")
    assert seen == {
        "series": ["loss on the training images"],
        "title": "loss on the training images, at fixed timesteps and noise",
    }


def test_plots_mark_the_stages_and_equal_distances_share_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"step": i, "loss": 0.5, "d_tokens": i / 10, "d_denoiser": i / 10} for i in range(1, 9)]
    rows += [{"step": i, "val_loss": 0.5} for i in (0, 8)]
    write_jsonl(run / "metrics.jsonl", rows)
    seen: dict[str, Any] = {}

    def plot(series: Any, path: Path, **how: Any) -> None:
        seen[path.name] = (list(series), how["look"])

    def plot_bins(over_steps: Any, pairs: Any, path: Path, **how: Any) -> None:
        seen[path.name] = (list(over_steps), list(pairs), how["marks"])

    monkeypatch.setattr(pictures, "plot_training", plot)
    monkeypatch.setattr(pictures, "plot_validation", plot_bins)
    assert [path.name for path in reports.plot_metrics(run)] == [
        "loss.png",
        "distance.png",
        "val.png",
    ]
    marks = [(0, "tokens"), (3, "denoiser")]
    assert seen["loss.png"] == (
        ["every step", "mean of 5"],
        TrainingLook(marks=marks, faint="every step"),
    )
    assert seen["distance.png"] == (["d_tokens = d_denoiser"], TrainingLook(log=True, marks=marks))
    bins = ["125", "375", "625", "875", "all"]
    assert seen["val.png"] == (bins, bins, marks)


def test_values_that_a_loss_logs_have_a_plot_with_a_panel_each(tmp_path: Path) -> None:
    rows = [{"step": i, "grad_norm": 1.0, "d": 0.1, "share": i / 9, "size": 9.0} for i in (1, 2)]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert [path.name for path in reports.plot_metrics(tmp_path)] == [
        "distance.png",
        "logged_values.png",
    ]
    with Image.open(tmp_path / "logged_values.png") as image:
        assert image.size == (960, 2 * 312)


def _pixel_rows(image: Image.Image) -> list[list[tuple[int, int, int]]]:
    pixels = list(image.convert("RGB").getdata())
    return [pixels[i : i + image.width] for i in range(0, len(pixels), image.width)]


def test_validation_is_drawn_over_steps_and_before_and_after(tmp_path: Path) -> None:
    """Of many timesteps, of which some are named."""
    names = [f"{i}" for i in range(40)]
    over_steps = {name: ([0, 5, 10], [0.0, -1.0, -float(name)]) for name in names}
    pairs = {name: (1.0, 1.0 - float(name) / 100) for name in names}
    path = tmp_path / "val.png"
    pictures.plot_validation(over_steps, pairs, path, title="loss", marks=[(5, "tokens")])
    with Image.open(path) as image:
        assert image.size == (1320, 540)
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(188, 213, 234), (27, 79, 138)} <= colors  # before and after
    ends = {name: ([0, 10], [0.0, -float(name) - 1]) for name in names[:4]}
    pictures.plot_validation(ends, {"all": (1.0, 0.0)}, path, title="loss", marks=[(5, "tokens")])
    with Image.open(path) as image:  # bars of two validations, no lines between them
        blue = [row.count((27, 79, 138)) for row in _pixel_rows(image.crop((0, 0, 660, 540)))]
    assert max(blue) > 200
