"""The image of a file of all benchmarks."""

import json

import pytest
from PIL import Image

from benchmarks import plot


def report(tmp_path, **changes):
    def step(add: float) -> dict[str, float]:
        return {"ops": 100 * (1 + add), "elementwise": 10 * (1 + add), "saved": 5 * (1 + add)}

    counted = {
        "frozen": step(0),
        "peft lora": step(2),
        "triton lora": step(0.5),
        "triton dora": step(0.9),
    }
    timed = [
        {
            "model": "sd15",
            "batch": 1,
            "contenders": {
                "frozen": {},
                "ours lora": {"ratio": 1.03},
                "peft lora": {"ratio": 1.06},
            },
        }
    ]
    parts = {
        "step cost": {"results": {"models": {"sdxl": {"step": counted}}}},
        "train step": {"results": {"results": timed}},
    }
    whole = {
        "machine": "a machine, 2 cores",
        "device": "cpu",
        "commit": "0123456789",
        "began": "2026-11-21T05:00",
        "parts": parts,
    } | changes
    (tmp_path / "all.json").write_text(json.dumps(whole))
    return tmp_path / "all.json"


def test_the_plot_shows_what_the_file_has(tmp_path, capsys):
    file = report(tmp_path)
    panels = plot.gather_panels(json.loads(file.read_text()))
    assert panels["operations launched"] == {
        "SDXL LoRA": {"ours": 1.5, "peft": 3.0},
        "SDXL DoRA": {"ours": pytest.approx(1.9)},
    }
    assert panels["time of a step, CPU"] == {"SD1.5 LoRA": {"ours": 1.03, "peft": 1.06}}
    assert plot.main([str(file), "--out", str(tmp_path / "docs" / "b.png")]) == 0
    with Image.open(tmp_path / "docs" / "b.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    assert (
        "times: not run"
        in plot.figure_caption(json.loads(file.read_text()), {"saved activations": {}}).lower()
    )


def test_a_file_without_figures_is_refused(tmp_path, capsys):
    assert (
        plot.main(
            [
                str(report(tmp_path, parts={"merge": {"error": "exit status 1"}})),
                "--out",
                str(tmp_path / "b.png"),
            ]
        )
        == 2
    )
    assert "neither counts nor times" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "none.json")]) == 2
    assert not (tmp_path / "b.png").exists()
