"""What is refused when a run is opened again; tests/test_measures.py looks at its model."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import train
from lora_core.config import Config, Stage
from lora_core.errors import UserError
from lora_core.toml import to_toml
from tests.conftest import save_photos
from training.comparisons.trained_runs import open_trained_run


def test_a_run_opens_with_what_it_was_trained_with_alone(
    config: Config, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = save_photos(tmp_path / "own")
    config = replace(config, data=replace(config.data, images=str(photos)))
    run = train.train(config)
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    opened = open_trained_run(run)
    assert opened.folder == run and opened.config.stages == config.stages
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
    (photos / "0.txt").write_text("another caption with TOK")
    with pytest.raises(UserError, match=r"captions of 1 image changed.*; put back what it was"):
        open_trained_run(run)
    shutil.rmtree(photos)
    with pytest.raises(UserError, match="does not exist"):
        open_trained_run(run)


def test_an_unfinished_run_is_refused(config: Config, quick: None, tmp_path: Path) -> None:
    run = train.train(config)
    longer = replace(config, stages=(Stage(9),))
    (run / "config.toml").write_text(to_toml(longer))
    with pytest.raises(UserError, match="has done 2 of 9 steps; finish it with --resume first"):
        open_trained_run(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint; expected the folder"):
        open_trained_run(run)
    with pytest.raises(UserError, match=r"has no config.toml; expected the folder"):
        open_trained_run(tmp_path)
