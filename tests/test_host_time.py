"""The benchmark of host time."""

import json

import pytest

from benchmarks import host_time


def test_the_table_has_every_contender(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    sizes = ["--layers", "2", "--width", "8", "--rows", "3", "--rank", "2", "--rounds", "2"]
    assert host_time.main([*sizes, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    names = ["frozen", "ours lora", "peft lora", "ours dora", "peft dora"]
    assert [row["contender"] for row in written["rows"]] == names and written["rank"] == 2
    by_name = {row["contender"]: row for row in written["rows"]}
    assert by_name["peft lora"]["ratio"] == 1 and by_name["ours lora"]["frames"] <= 10
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert host_time.main(["--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err
