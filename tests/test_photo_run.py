"""Runs on uploaded photos: what is written for them is what training reads, and no name leads out
of the folder of the runs.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.toml import read_toml
from training import photo_run, setup
from training.checks import config_checks
from training.photo_run import CAPTION, PhotoRun, PhotoRuns, caption_table, stretch_stages

ZIB = sorted(Path("toy/concepts/zib").glob("*.png"))
TOY_CONFIG = Path("configs/toy_pti.toml")


class Started:
    """The run process of a test, which is none."""

    is_running = True

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.place, self.folder = config, folder, Path(config.out)
        self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PhotoRuns:
    monkeypatch.setattr(photo_run.RunProcess, "start", Started)
    monkeypatch.setattr(photo_run.RunProcess, "resume", Started)
    return PhotoRuns("toy/model", tmp_path, {"toy": TOY_CONFIG})


def form(**changes: Any) -> PhotoRun:
    photos = [(str(path), None) for path in ZIB[:3]]
    usual = PhotoRun(photos, [], "mine", "toy", 30, 10, 64, " a TOK \n\na red TOK\n")
    return replace(usual, **changes)


def test_a_caption_that_was_edited_wins() -> None:
    photos = [("/tmp/x/b.png", None), ("a.jpg", "given"), ("c.png", "given")]
    edited = [["c.png", "typed"], ["gone.png", "old"]]
    rows = [["b.png", CAPTION], ["a.jpg", "given"], ["c.png", "typed"]]
    assert caption_table(photos, edited) == rows
    assert caption_table(photos, rows) == rows  # nothing changes by looking again
    assert caption_table(None, rows) == []


def test_the_photos_are_trained_with_their_captions(runs: PhotoRuns, tmp_path: Path) -> None:
    """Read back by training's own reader."""
    runs.start(form(captions=[[ZIB[1].name, "TOK, blue ✓"]]))
    config = runs.newest.config  # type: ignore[union-attr]
    place = tmp_path / "mine.web" / "photos"
    assert config.data.images == str(place)
    copies = [(place / f"{number:03d}.png").read_bytes() for number in (1, 2, 3)]
    assert copies == [path.read_bytes() for path in ZIB[:3]]
    config_checks.check_config(config)
    records = setup.open_data(config).training.records
    captions = [record.captions for record in records]
    assert captions == [(CAPTION,), ("TOK, blue ✓",), (CAPTION,)]


def test_a_run_is_the_preset_with_what_the_form_says(runs: PhotoRuns, tmp_path: Path) -> None:
    for name in runs.presets:
        runs.newest = None
        runs.start(form(name=f"run-{name}", preset=name))
        config, preset = runs.newest.config, runs.read_preset(name)  # type: ignore[attr-defined]
        assert config.steps == 30 and config.samples.every == 10
        assert config.samples.prompts == ("a TOK", "a red TOK")
        assert config.model == "toy/model" and config.data.resolution == 64
        assert not config.samples.show_data  # other people's photos
        same = {"data": preset.data, "samples": preset.samples, "stages": preset.stages}
        own = {"out": preset.out, "log_every": preset.log_every, **same}
        assert asdict(replace(config, **own)) == asdict(preset)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(1, 20_000))
def test_stages_keep_their_proportions(lengths: list[int], steps: int) -> None:
    stages = tuple(Stage(steps=length) for length in lengths)
    assert stretch_stages(stages, sum(lengths)) == stages
    try:
        scaled = [stage.steps for stage in stretch_stages(stages, steps)]
    except UserError:
        assert steps * min(lengths) / sum(lengths) < 1.5  # else no stage is left without any
        return
    assert sum(scaled) == steps and min(scaled) >= 1
    for length, count in zip(lengths, scaled):
        assert abs(count - steps * length / sum(lengths)) <= 1


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a.b", "a b", "/tmp/x", "-x", "é"])
def test_no_name_leads_out_of_the_folder(runs: PhotoRuns, tmp_path: Path, name: str) -> None:
    for begin in (lambda: runs.start(form(name=name)), lambda: runs.resume(name)):
        with pytest.raises(UserError, match="cannot name a folder; use letters, digits, - and _"):
            begin()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"photos": []}, "there are no photos"),
        ({"photos": None}, "there are no photos"),
        (
            {"preset": "configs/toy_pti.toml"},
            "there is no preset 'configs/toy_pti.toml'; choose toy",
        ),
        ({"preset": "charater"}, "choose toy, character, style, object"),
        ({"steps": 1}, "1 steps leave none for one of 2 stages"),
        ({"steps": -5}, "-5 steps leave none"),
    ],
)
def test_a_mistake_writes_nothing(
    runs: PhotoRuns, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        runs.start(form(**changes))
    assert not list(tmp_path.iterdir()) and runs.newest is None


def test_a_run_is_replaced_only_where_that_was_said(runs: PhotoRuns, tmp_path: Path) -> None:
    runs.start(form())
    (tmp_path / "mine").mkdir()
    runs.newest = None
    with pytest.raises(UserError, match="mine is there already; choose another name, or replace"):
        runs.start(form(photos=[(str(ZIB[4]), None)]))
    place = tmp_path / "mine.web" / "photos"
    assert len(list(place.iterdir())) == 6  # those of the first run
    runs.start(form(photos=[(str(ZIB[4]), None)], overwrite=True))
    assert sorted(path.name for path in place.iterdir()) == ["001.png", "001.txt"]
    assert runs.newest.config.overwrite  # type: ignore[attr-defined]


def test_one_run_is_trained_at_a_time(runs: PhotoRuns, tmp_path: Path) -> None:
    runs.stop()  # of nothing
    runs.start(form())
    for begin in (lambda: runs.start(form(name="other")), lambda: runs.resume("mine")):
        with pytest.raises(UserError, match="mine is training; stop it, or wait until it ends"):
            begin()
    runs.stop()
    assert runs.newest.is_stopped  # type: ignore[attr-defined]


def test_a_run_goes_on_with_its_own_config(runs: PhotoRuns, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run mine was begun here"):
        runs.resume("mine")
    (tmp_path / "mine.web").mkdir()
    with pytest.raises(UserError, match="no config file"):
        runs.resume("mine")
    (tmp_path / "mine").mkdir()
    shutil.copy(TOY_CONFIG, tmp_path / "mine" / "config.toml")
    runs.resume("mine")
    assert runs.newest.config == read_toml(TOY_CONFIG)  # type: ignore[attr-defined]
    assert runs.newest.place == tmp_path / "mine.web"  # type: ignore[attr-defined]
