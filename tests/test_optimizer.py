"""The benchmark of the optimizers, on three small layers."""

import json

import pytest

from benchmarks import optimizer


def test_each_contender_has_a_row_with_counts_errors_and_times(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        optimizer, "tensor_shapes", lambda network, rank: [(rank, 7), (5, rank)] * 3
    )
    options = ["--networks", "sd15", "--rank", "2", "--rounds", "3", "--device", "cpu"]
    assert optimizer.main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = {(row["optimiser"], row["contender"]): row for row in written["rows"]}
    assert len(rows) == 5 and written["threads"] == 1 and "torch" in written["machine"]
    keys = ("launches", "waits", "tensors", "parameters")
    assert [rows["prodigy", "ours"][key] for key in keys] == [2, 0, 6, 72]
    assert rows["prodigy", "prodigyopt"]["waits"] == 2 * 6
    assert rows["prodigy", "prodigyopt"]["launches"] == 13 * 6
    assert rows["adamw", "ours"]["launches"] == 1
    assert rows["adamw", "torch, fused"]["launches"] == 2
    for ours, peer in (
        (rows["prodigy", "ours"], rows["prodigy", "prodigyopt"]),
        (rows["adamw", "ours"], rows["adamw", "torch, fused"]),
    ):
        assert ours["error"] <= 2 * peer["error"] + 1e-6
        assert (ours["error of d"] or 0) <= 2 * (peer["error of d"] or 0) + 1e-6
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows.values())
    assert rows["adamw", "torch, fused"]["ratio"] == 1
    assert "sd15" in capsys.readouterr().out


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer.main(["--rounds", "0", "--device", "cpu"]) == 2
    assert "--rounds is 0; expected a number from 1 on" in capsys.readouterr().err
