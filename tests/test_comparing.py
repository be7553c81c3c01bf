"""Which runs a command line names, and the plot of a comparison."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import train
from lora_core.errors import UserError
from lora_core.runs.comparison import NO_TIME, Measured, Score, compare_runs
from tests.test_comparison import write  # noqa: F401 (a fixture)
from training.comparisons import comparing


def test_runs_are_named_by_folder_holder_or_pattern(tmp_path: Path) -> None:
    for name in ("mse_0", "mse_1", "huber_0", "lab/a", "lab/b", "lab/notes"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if name != "lab/notes":
            (folder / "config.toml").write_text("")
    mse = [tmp_path / "mse_0", tmp_path / "mse_1"]
    lab = [tmp_path / "lab" / "a", tmp_path / "lab" / "b"]
    assert comparing.find_runs([str(tmp_path / "mse_*")], "--compare") == mse
    assert comparing.find_runs([str(tmp_path / "lab")], "--compare") == lab
    assert comparing.find_runs([str(mse[1]), str(tmp_path / "l*"), str(mse[1])], "-") == [
        mse[1], *lab
    ]  # fmt: skip
    for word in ("nothing_*", "lab/notes", "mse_0/config.toml"):
        with pytest.raises(UserError, match=r"--against .* names no run"):
            comparing.find_runs([str(tmp_path / word)], "--against")


def test_groups_are_compared_and_plotted(
    write: object,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for s in range(3):
        write(f"mse_{s}", s), write(f"huber_{s}", s, 0.4, loss="huber")
    assert train.main(["--compare", "mse_*", "--against", "huber_*"]) == 0
    printed = capsys.readouterr().out
    assert "A = mse: mse_0 mse_1 mse_2" in printed and "loss: 'mse' in A, 'huber' in B" in printed
    assert "loss: B lower by 0.09988 +- " in printed and "over 3 seeds, 6 images" in printed
    assert Image.open("huber_0/compare_mse.png").width > 100
    assert train.main(["--compare", "mse_0", "--against", "huber_0", "--plot", "own.png"]) == 0
    assert os.path.exists("own.png") and "one seed: the error is over" in capsys.readouterr().out
    each = ["--compare=mse_0", "--compare", "mse_1", "--against", "huber_0", "--against", "huber_1"]
    assert train.main([*each, "--metric", "loss"]) == 0
    assert "over 2 seeds, 6 images" in capsys.readouterr().out
    for words in (["--compare", "mse_*"], ["--compare", "mse_0", "mse_1", "huber_0"], ["--compare"],
                  ["--against", "mse_0"]):  # fmt: skip
        assert train.main(words) == 2
        assert "--compare takes two runs, or runs and --against" in capsys.readouterr().err
    # before a measure is looked for, which opens the model that it names
    assert train.main(["--compare", "mse_0", "mse_1/../mse_0", "--metric", "clip:"]) == 2
    assert "mse_0 is on both sides" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [(0, 1, 2), (0,)])
def test_a_measure_without_timesteps_is_plotted_over_seeds(
    write: object,  # noqa: F811
    tmp_path: Path,
    seeds: tuple[int, ...],
) -> None:
    sides = [[write(f"{name}_{s}", s) for s in seeds] for name in ("a", "b")]
    scores = {}
    for n, run in enumerate([*sides[0], *sides[1]]):
        scores[run] = [Score(f"k{i}", 0, -1, NO_TIME, 0.1 * n * i) for i in range(3)]
    found = compare_runs(*sides, measured=Measured("folder/x.py:fn", True, scores))
    path = comparing.plot_path(found)
    assert path == sides[1][0] / f"compare_{found.names[0]}_x.py_fn.png"
    if len(seeds) == 1:  # as of a single image, which has no error
        found = replace(found, overall=found.overall._replace(error=float("nan")))
    assert Image.open(comparing.plot_comparison(found, path)).width > 100
