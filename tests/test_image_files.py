"""Names of the files that infer.py writes, and what is refused before an image is drawn."""

from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.runs.image_files import check_image_files, check_seeds, image_paths
from lora_core.runs.image_grid import parse_axis


def test_several_images_are_numbered() -> None:
    assert image_paths("a/b.png", 1) == [Path("a/b.png")]
    assert image_paths("a/b.png", 2) == [Path("a/b_000.png"), Path("a/b_001.png")]


@pytest.mark.parametrize("ending", ["png", "gif", "webp"])
def test_files_that_exist_stay(tmp_path: Path, ending: str) -> None:
    out = str(tmp_path / f"x.{ending}")
    check_image_files(out, [Path(out)], overwrite=False)
    Path(out).write_bytes(b"mine")
    with pytest.raises(UserError, match="pass --overwrite"):
        check_image_files(out, [Path(out)], overwrite=False)
    check_image_files(out, [Path(out)], overwrite=True)


@pytest.mark.parametrize("name", ["x.jpg", "x", "file/x.png"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = str(tmp_path / name)
    with pytest.raises(UserError, match="--out"):
        check_image_files(out, [Path(out)], overwrite=True)


def test_seeds_are_those_that_torch_takes() -> None:
    check_seeds(2**64 - 2, 2, [])
    with pytest.raises(UserError, match="out of range"):
        check_seeds(2**64 - 1, 2, [])
    with pytest.raises(UserError, match="out of range"):
        check_seeds(0, 1, [parse_axis("seed=0,1e30")])
