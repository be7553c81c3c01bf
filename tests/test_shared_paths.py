"""Paths in shared files: no user name is written, and only files of this disk are found."""

import os
from pathlib import Path

import pytest

from lora_core.shared_paths import find_shared_path, nearest_path, path_from, shorten_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home" / "alice"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


def test_a_users_folders_are_not_written(home: Path) -> None:
    near = home.parent / "images"
    assert shorten_path(str(home / "work" / "base"), near) == "base"
    assert shorten_path(str(home / "models" / "base"), near) == "~/models/base"
    assert shorten_path(str(near / "base"), near) == "base"
    for unchanged in ("runwayml/sd15", "../base", "/data/models/base", "", "base:v1"):
        assert shorten_path(unchanged, near) == unchanged


def test_the_nearest_path_of_a_missing_one(home: Path) -> None:
    Path("configs/presets").mkdir(parents=True)
    Path("configs/toy_pti.toml").touch()
    assert nearest_path("config/toy_pti.toml") == "configs/toy_pti.toml"
    assert nearest_path(Path("configs/toy_pit.toml")) == "configs/toy_pti.toml"
    assert nearest_path(str(home / "works")) == str(home / "work")
    for far in ("runwayml/sd15", "configs/other.toml", "configs/toy_pti.toml/x"):
        assert nearest_path(far) == ""


def test_a_relative_path_is_named_from_another_folder(home: Path) -> None:
    Path("toy/model").mkdir(parents=True)
    assert path_from(home / "work/runs/anna", "toy/model") == "../../toy/model"
    Path("../base").mkdir()
    assert path_from(Path("runs/anna"), "../base") == "../../../base"
    for unchanged in ("runwayml/sd15", str(home / "work")):
        assert path_from(home / "runs", unchanged) == unchanged
    for elsewhere in (home / "runs", Path("/elsewhere/runs")):
        assert path_from(elsewhere, "toy/model") == "toy/model"


def test_what_was_shortened_is_found_again(home: Path) -> None:
    near = home.parent / "images"
    for path in (home / "work" / "base", home / "models" / "b.safetensors", near / "c.safetensors"):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"x")
        found = find_shared_path(shorten_path(str(path), near), near)
        assert found is not None and Path(found).samefile(path)


def test_devices_pipes_and_other_machines_are_no_files(home: Path) -> None:
    os.mkfifo("pipe")
    for name in (
        "",
        "pipe",
        "/dev/zero",
        "//server/share",
        r"\\server\share",
        "a\0b",
        "~nobody9/x",
    ):
        assert find_shared_path(name, ".") is None
