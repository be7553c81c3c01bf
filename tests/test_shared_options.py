"""Options that files share: nothing of the owner's folders, and nothing that was not there."""

from pathlib import Path

import pytest

from lora_core.runs.shared_options import share_options


def test_a_table_of_options_is_shared_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older config has fewer options; nothing is added, and the table itself stays."""
    home = tmp_path / "home" / "alice"
    monkeypatch.setenv("HOME", str(home))
    table = {
        "model": str(home / "base"),
        "out": str(home / "runs" / "mine"),
        "data": {
            "images": str(home / "anna"),
            "masks": f"clipseg@{home}/seg: a face",
            "flip": True,
            "pairs": str(home / "anna"),
        },
        "from_lora": str(home / "anna.safetensors"),
        "stages": [{"steps": 3, "schedule": f"{home}/my.py:fn"}],
        "of_another_version": 1,
    }
    before = repr(table)
    assert share_options(table, home.parent / "runs") == {
        "model": "~/base",
        "out": "mine",
        "data": {"images": "", "masks": "clipseg@~/seg:a face", "flip": True, "pairs": ""},
        "from_lora": "anna.safetensors",
        "stages": [{"steps": 3, "schedule": "~/my.py:fn"}],
        "of_another_version": 1,
    }
    assert repr(table) == before


def test_columns_are_no_folder() -> None:
    table = {"data": {"pairs": "winner,loser"}}
    assert share_options(table, ".") == table


def test_shards_are_files_of_this_computer() -> None:
    data = {"dataset": "anna/{000..009}.tar", "streaming": True}
    assert share_options({"data": data}, ".") == {"data": {"dataset": "", "streaming": True}}
    hub = {"data": {"dataset": "user/name", "streaming": False}}
    assert share_options(hub, ".") == hub


def test_folders_of_subsets_are_not_shared() -> None:
    table = {"data": {"subsets": [{"images": "/home/anna/photos", "repeats": 3}, {"images": "b"}]}}
    shared = share_options(table, ".")
    assert shared == {"data": {"subsets": [{"images": "", "repeats": 3}, {"images": ""}]}}
    assert table["data"]["subsets"][0]["images"] == "/home/anna/photos"
