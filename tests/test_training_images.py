"""training_images: where the images of a config come from. Streams: tests/test_streams.py; files
that are left out: tests/test_image_checks.py.
"""

from pathlib import Path

import pytest

from lora_core.config import Config
from lora_core.runs.run_folder import Run
from tests.conftest import merged, save_photos
from training.inputs.training_images import (
    open_held_out_images,
    open_training_images,
    write_left_out,
)


def test_held_out_images_that_cannot_be_read_are_left_out_too(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_photos(tmp_path / "held", count=2)
    (folder / "bad.png").write_bytes(b"")
    (folder / "bad.txt").write_text("a photo of TOK")
    options = {"data": {"skip_bad": True}, "validation": {"images": str(folder)}}
    config = merged(config, options)
    assert len(open_held_out_images(config)) == 2
    assert f"1 of 3 images are left out:\n  {folder / 'bad.png'}: it is empty" in (
        capsys.readouterr().out
    )
    found = open_training_images(config)
    assert "all 5 images can be read" in capsys.readouterr().out
    assert not found.left_out and found.listing and found.records is found.winners


def test_the_list_of_a_run_is_that_of_its_last_start(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=1)
    file = tmp_path / "skipped_files.txt"
    write_left_out({Path("a.png"): "it is empty", Path("b\udcff.png"): "cut"}, run)
    assert file.read_text() == "a.png: it is empty\nb\\udcff.png: cut\n"
    write_left_out({}, run)
    assert not file.exists()
