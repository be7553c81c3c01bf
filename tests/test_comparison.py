"""Comparison of runs that only their folders record: the verdict, its words, and the refusals."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.config import Config, Stage, ValidationConfig
from lora_core.errors import UserError
from lora_core.runs import comparison
from lora_core.runs.comparison import compare_runs, group_runs
from lora_core.runs.standard_error import paired_estimate
from lora_core.toml import to_toml
from training import run_identity

Write = Callable[..., Path]
TIMES = (250.0, 750.0)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a run of 10 steps whose losses on 6 images are `base` and a bit of the image's, the
    seed's and both.
    """

    def write_run(
        name: str,
        seed: int = 0,
        base: float = 0.5,
        *,
        noise: float = 0.001,
        images: int = 6,
        draws: int = 1,
        weights: dict[str, str] | None = None,
        steps: int = 10,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = Config(model="toy/model", out=str(folder), seed=seed, stages=(Stage(10),))
        (folder / "config.toml").write_text(to_toml(replace(config, **changes)))
        generator = torch.Generator().manual_seed(10 * len(name) + seed)
        lines = []
        for step in (0, steps):
            for i in range(images):
                for draw in range(draws):
                    for bin, t in enumerate(TIMES):
                        rest = torch.randn((), generator=generator).item()
                        loss = base + 0.1 * i + 0.01 * seed + noise * rest + 0.001 * bin
                        row = {"step": step, "key": f"k{i}", "draw": draw, "bin": bin, "t": t}
                        lines.append(json.dumps(row | {"loss": loss if step else 1.0}))
        (folder / "val.jsonl").write_text("\n".join(lines))
        if weights is not None:
            state = {"step": 10, "bytes": 0, "meta": {"identity": {"model": weights}}}
            checkpoint = folder / "checkpoints" / "10"
            checkpoint.mkdir(parents=True)
            (checkpoint / "state.json").write_text(json.dumps(state))
        return folder

    return write_run


def read(run: Path) -> dict[tuple[str, float], float]:
    rows = [json.loads(line) for line in (run / "val.jsonl").read_text().splitlines()]
    return {(row["key"], row["t"]): row["loss"] for row in rows if row["step"] == 10}


def test_a_better_loss_is_told_over_seeds_and_images(write: Write) -> None:
    a = [write(f"mse_{s}", s, 0.5) for s in range(4)]
    b = [write(f"huber_{s}", s, 0.49, loss="huber") for s in range(4)]
    found = compare_runs(a, list(reversed(b)))  # paired by seed, not by place
    assert found.names == ("mse", "huber") and found.is_paired and found.images == 6
    assert found.changes == ("loss: 'mse' in A, 'huber' in B",)
    d = torch.zeros(4, 6, dtype=torch.float64)
    for s in range(4):
        one, other = read(a[s]), read(b[s])
        for i in range(6):
            d[s, i] = statistics.fmean(other[f"k{i}", t] - one[f"k{i}", t] for t in TIMES)
    wanted = paired_estimate(d)
    assert found.overall.mean == pytest.approx(wanted.mean, rel=1e-9)
    assert found.overall.error == pytest.approx(wanted.error, rel=1e-9)
    assert found.overall.pairs == 24 and [row.t for row in found.bins] == list(TIMES)
    assert list(found.by_seed) == [0, 1, 2, 3]
    assert list(found.by_seed.values()) == pytest.approx(d.mean(1).tolist(), rel=1e-9)
    for i, row in enumerate(found.bins):
        changes = [read(b[0])[f"k{k}", TIMES[i]] - read(a[0])[f"k{k}", TIMES[i]] for k in range(6)]
        assert row.mean == pytest.approx(statistics.fmean(changes), abs=0.001)
    shown, error = comparison.round_together(-wanted.mean, wanted.error)
    assert found.verdict == (
        f"B lower by {shown} +- {error} over 4 seeds, 6 images, which is better"
    )


def test_what_chance_explains_is_no_difference(write: Write) -> None:
    a = [write(f"a{s}", s, noise=0.05) for s in range(3)]
    b = [write(f"bbb{s}", s, noise=0.05, loss="huber") for s in range(3)]
    found = compare_runs(a, b)
    assert not found.overall.estimate.is_significant
    assert found.verdict.startswith("no difference can be told: ")
    assert found.verdict.endswith("over 3 seeds, 6 images")


def test_the_words_say_what_the_error_leaves_out(write: Write) -> None:
    a, b = write("a", 0, 0.5), write("b", 0, 0.4)
    one = compare_runs([a], [b])
    assert one.verdict.endswith("which is better; one seed: the error is over images only")
    others = [write(f"c{s}", s, 0.4) for s in (5, 6)]
    apart = compare_runs([a], others)
    assert not apart.is_paired and not apart.by_seed
    assert "over 1 and 2 seeds, 6 images" in apart.verdict
    assert "have different seeds, so they are paired by image only" in apart.verdict
    assert "A has one seed, whose spread is not counted" in apart.verdict
    single = compare_runs([write("d", images=1)], [write("e", images=1)])
    assert single.verdict.startswith("no difference can be told from 1 seed, 1 image")
    seeds = [write(f"f{s}", s, 0.3, images=1) for s in range(2)]
    more = [write(f"gg{s}", s, 0.2, images=1) for s in range(2)]
    assert "one image: the error is over seeds only" in compare_runs(seeds, more).verdict


def test_draws_of_an_image_are_averaged_unless_they_count_apart(write: Write) -> None:
    a, b = write("a", draws=3), write("bb", base=0.4, draws=3)
    together = compare_runs([a], [b])
    apart = compare_runs([a], [b], draws_apart=True)
    assert (together.overall.pairs, apart.overall.pairs) == (6, 18)
    assert together.overall.mean == pytest.approx(apart.overall.mean, rel=1e-12)
    assert "6 images x 3 noise draws" in apart.verdict
    assert "the error is over images and draws only" in apart.verdict


def test_a_measure_of_which_more_is_better_is_called_so(write: Write) -> None:
    runs = [write(f"a{s}", s) for s in range(3)], [write(f"bb{s}", s) for s in range(3)]
    score = comparison.Score("k", 0, -1, comparison.NO_TIME, 0.0)
    scores = {}
    for side, base in zip(runs, (0.2, 0.7)):
        for s, run in enumerate(side):
            scores[run] = [score._replace(key=f"k{i}", loss=base + 0.01 * i * s) for i in range(4)]
    measured = comparison.Measured("likeness", True, scores)
    found = compare_runs(*runs, measured=measured)
    assert found.bins == () and found.images == 4
    assert found.verdict.startswith("B higher by 0.5") and "which is better" in found.verdict
    worse = compare_runs(*reversed(runs), measured=measured)
    assert worse.verdict.startswith("B lower by 0.5") and "which is worse" in worse.verdict
    text = comparison.describe_result(found)
    assert "likeness: B higher by" in text and "timestep" in text and "each seed: 0: " in text


def test_groups_are_runs_that_differ_in_seed_and_place_alone(write: Write) -> None:
    runs = [write(f"mse_seed{s}", s, samples=Config().samples) for s in range(2)]
    runs += [write(f"h_{s}", s, loss="huber") for s in range(2)]
    runs += [write("h_2", 2, loss="huber", loss_arg={"delta": 0.3})]
    runs += [write("h_9", 9, loss="l1"), write("h_8", 8, loss="l1", threads=3)]
    groups = group_runs(runs)
    assert groups == {"mse": runs[:2], "h": runs[2:4], "h_2": runs[4:5], "h (2)": runs[5:]}


REFUSED = {
    "another base model": ({"weights": {"unet": "1"}}, {"weights": {"unet": "2"}}, r"\(unet\)"),
    "a model elsewhere": ({}, {"model": "other"}, r"different base models \(model\)"),
    "other images": ({}, {"images": 5}, "different images, timesteps or draws"),
    "other draws": ({"draws": 2}, {}, "different images, timesteps or draws"),
    "other noise": ({}, {"validation": ValidationConfig(seed=1)}, "with validation.seed 0"),
    "unfinished": ({}, {"steps": 7}, "after 7 of 10 steps; finish it with --resume"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(write: Write, name: str) -> None:
    one, other, message = REFUSED[name]
    a, b = write("a", **one), write("b", **other)
    with pytest.raises(UserError, match=message):
        compare_runs([a], [b])


def test_every_run_of_a_side_has_the_same_model(write: Write) -> None:
    a = [write("a0", 0, weights={"unet": "1"}), write("a1", 1, weights={"unet": "2"})]
    b = [write("bb0", 0, weights={"unet": "1"}), write("bb1", 1, weights={"unet": "1"})]
    with pytest.raises(UserError, match=r"a0 and .*a1 have different base models \(unet\)"):
        compare_runs(a, b)


def test_the_same_weights_elsewhere_or_in_another_precision_are_the_same_model(
    write: Write,
) -> None:
    a = write("a", weights={"unet": "1"})
    compare_runs([a], [write("b", weights={"unet": "1"}, model="copy")])
    cast = write("c", weights={"unet": "2"}, precision="bf16")
    assert compare_runs([a], [cast]).changes == ("precision: 'fp32' in A, 'bf16' in B",)


def test_options_without_effect_are_those_that_a_resumed_run_may_change() -> None:
    reasons = (
        run_identity.WHERE_WRITTEN, run_identity.WHEN_LOOKED_AT, run_identity.COMPUTED_BY
    )  # fmt: skip
    free = {name for name, why in run_identity.FREE_OPTIONS.items() if why in reasons}
    assert set(comparison.NO_EFFECT) == free


def test_a_side_is_one_config_with_each_seed_once(write: Write) -> None:
    a, b = write("a", 0), write("b", 1, loss="huber")
    with pytest.raises(UserError, match=r"side B .* \(loss: 'mse' in a, 'huber' in b\)"):
        compare_runs([write("c")], [a, b])
    with pytest.raises(UserError, match="on side A both have seed 0"):
        compare_runs([a, write("d", 0)], [b])
    with pytest.raises(UserError, match="no run to compare"):
        compare_runs([a], [])


def test_without_a_config_the_losses_are_compared_and_it_says_so(write: Write) -> None:
    a, b = write("a"), write("b", base=0.4)
    (a / "config.toml").unlink()
    found = compare_runs([a], [b])
    assert found.changes == (f"unknown: {a} has no config.toml",)
    assert found.overall.mean == pytest.approx(-0.1, abs=0.01)


def test_numbers_are_rounded_to_the_second_digit_of_their_error() -> None:
    assert comparison.round_together(0.0021234, 0.00084) == ("0.00212", "0.00084")
    assert comparison.round_together(123.456, 12.3) == ("123", "12")
    assert comparison.round_together(0.5, 0.0) == ("0.5", "0")
    assert comparison.round_together(0.5, math.nan) == ("0.5", "nan")
