"""The grid of losses and seeds: its parts, and a tiny one that is broken off and started again."""

import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

import train
from benchmarks import loss_lab
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.runs.comparison import group_runs, read_recorded_run
from lora_core.toml import read_toml, to_toml
from tests.conftest import rows


def test_losses_are_named_with_their_arguments() -> None:
    edges = "examples/my_loss.py:edges"
    found = loss_lab.parse_losses(["mse", "huber:delta=0.2,schedule=snr", f"{edges}:strength=1"])
    assert [loss.name for loss in found] == ["mse", "huber", edges]
    assert found[1].arguments == {"delta": 0.2, "schedule": "snr"}
    assert found[2].arguments == {"strength": 1}
    assert [loss.label for loss in found] == [
        "mse",
        "huber_delta=0.2_schedule=snr",
        "edges_strength=1",
    ]
    refused = {
        ("mse",): "at least two --loss, got 1",
        ("mse", "mse"): "is there twice",
        ("mse", "hubr"): "the nearest is 'huber'",
        ("mse", "huber:dleta=1"): "takes no argument 'dleta'",
    }
    for specs, message in refused.items():
        with pytest.raises(UserError, match=message):
            loss_lab.parse_losses(specs)


@pytest.mark.parametrize(
    ("lengths", "steps", "scaled"),
    [
        ([100, 200], 30, [10, 20]),
        ([100, 200], 2, [1, 1]),
        ([1, 1, 998], 10, [1, 1, 8]),
        ([998, 1, 1], 10, [8, 1, 1]),
        ([3, 3, 3], 1000, [333, 334, 333]),
        ([7], 3, [3]),
    ],
)
def test_stages_keep_their_proportions(lengths: list, steps: int, scaled: list) -> None:
    stages = loss_lab.scale_stages([Stage(n) for n in lengths], steps)
    assert [stage.steps for stage in stages] == scaled and sum(scaled) == steps
    with pytest.raises(UserError, match="--steps 0 is less than the"):
        loss_lab.scale_stages([Stage(n) for n in lengths], 0)


def test_a_concept_of_the_toy_model_is_validated_in_new_places(tmp_path: Path) -> None:
    base = read_toml(Path("configs/toy_pti.toml"))
    found = loss_lab.add_held_out_images(base, tmp_path)
    drawn = sorted(Path(found.validation.images).glob("*.png"))
    assert len(drawn) == 16 and found.validation.images == str(tmp_path / "held_out")
    times = [path.stat().st_mtime_ns for path in drawn]
    assert loss_lab.add_held_out_images(base, tmp_path) == found
    assert [path.stat().st_mtime_ns for path in drawn] == times
    photos = replace(base, data=replace(base.data, images="photos"))
    assert loss_lab.add_held_out_images(photos, tmp_path) == photos
    own = replace(base, validation=replace(base.validation, images="mine"))
    assert loss_lab.add_held_out_images(own, tmp_path) == own


def test_the_grid_has_each_loss_with_each_seed(config: Config, tmp_path: Path) -> None:
    losses = loss_lab.parse_losses(["mse", "huber:delta=0.2"])
    planned = loss_lab.plan_runs(replace(config, seed=5), losses, 2, tmp_path)
    folders = []
    for own in planned:
        Path(own.out).mkdir()
        (Path(own.out) / "config.toml").write_text(to_toml(own))
        folders.append(Path(own.out))
        assert own.samples.prompts == ("a TOK",) and own.data.cache == str(tmp_path / "cache")
    assert [(own.loss, own.loss_arg, own.seed) for own in planned] == [
        ("mse", {}, 5), ("mse", {}, 6), ("huber", {"delta": 0.2}, 5), ("huber", {"delta": 0.2}, 6)
    ]  # fmt: skip
    assert group_runs(folders) == {"mse": folders[:2], "huber_delta=0.2": folders[2:]}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of the processes that the lab starts; they run in this one."""
    given: list[list[str]] = []

    def run(command: list[str], *, stdout: IO[str], stderr: int, env: dict[str, str]) -> object:
        assert stderr == subprocess.STDOUT and env["OMP_NUM_THREADS"]
        assert command[:2] == [sys.executable, str(Path(train.__file__))]
        given.append(command[2:])
        with redirect_stdout(stdout), redirect_stderr(stdout):
            return types.SimpleNamespace(returncode=train.main(command[2:]))

    own = types.SimpleNamespace(run=run, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(loss_lab, "subprocess", own)
    return given


def test_a_grid_is_trained_once_and_compared(
    config: Config,
    quick: None,
    commands: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "lab.toml", tmp_path / "lab"
    file.write_text(to_toml(replace(config, out="elsewhere")))
    words = [str(file), "--loss", "mse", "--loss", "l1", "--seeds", "1", "--out", str(out)]
    words += ["--steps", "4", "--optimizer.clip", "0.5"]
    assert loss_lab.main([*words, "--data.images", str(tmp_path / "none")]) == 2
    told = capsys.readouterr()
    assert "2 of 2 runs failed; mse_0: " in told.err and "does not exist" in told.err
    commands.clear()
    assert loss_lab.main(words) == 0
    told = capsys.readouterr().out
    assert "## l1 against mse" in told and "  loss: 'mse' in A, 'l1' in B" in told
    assert "over 1 seed, 5 images" in told and (out / "l1_against_mse.png").is_file()
    folders = [out / "mse_0", out / "l1_0"]
    assert len(commands) == 2
    page = (out / "page.html").read_text()
    assert all(f">{folder.name}<" in page for folder in folders)
    for folder in folders:
        recorded = read_recorded_run(folder).settings
        assert recorded["stages.0.steps"] == 4 and recorded["optimizer.clip"] == 0.5
        assert recorded["data.cache"] == str(out / "cache") and rows(folder)[-1]["step"] == 4
    assert any((out / "cache").iterdir())
    commands.clear()
    assert loss_lab.main(words) == 0 and not commands  # everything is there
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert loss_lab.main([*words, "--optimizer.clip", "1"]) == 2
    assert "another config (optimizer.clip: 0.5 there, 1.0 here)" in capsys.readouterr().err
    (folders[1] / "summary.json").unlink()  # as if it had been interrupted after its checkpoint
    assert loss_lab.main(words) == 0
    assert commands == [[str(out / "logs" / "l1_0.toml"), "--resume"]]
    assert "resumed after step 4" in (out / "logs" / "l1_0.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--validation.every", "-1"], "leave --validation.every out"),
        (["--metric", "nothing"], "unknown measure 'nothing'"),
    ],
)
def test_a_grid_that_cannot_be_compared_is_refused_first(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["configs/toy_pti.toml", "--loss", "mse", "--loss", "l1", "--out", str(tmp_path / "x")]
    assert loss_lab.main([*given, *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
