"""Axes of image grids: SETTING=START:STOP:STEP and SETTING=A,B,C."""

from pathlib import Path

import pytest
from PIL import Image

from lora_core.errors import UserError
from lora_core.runs.image_grid import grid_cells, grid_rows, label_axes, parse_axis


def test_axes_are_read_as_documented() -> None:
    assert parse_axis("strength=0:1.2:0.3").values == [0, 0.3, 0.6, 0.9, 1.2]
    assert parse_axis("seed=0:4").values == [0, 1, 2, 3]
    assert parse_axis("lora1.text=1,0").values == [1, 0]


@pytest.mark.parametrize(
    "text",
    [
        "strength",
        "strength=1:0:0",
        "speed=0:1",
        "strength=a:b",
        "strength=0:1000:0.1",
        "seed=0:1e12",
        "seed=0.5,1",
        "steps=nan",
        "guidance=inf",
        "seed=1:",
    ],
)
def test_other_axes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--grid"):
        parse_axis(text)


def test_axes_of_one_lora_are_called_by_its_file_or_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    (run / "checkpoints" / "300").mkdir(parents=True)
    loras = ["two/zib.safetensors", str(run), str(run / "checkpoints" / "300"),
             str(run / "checkpoints" / "200" / "pytorch_lora_weights.safetensors")]  # fmt: skip
    settings = ["lora0.strength", "lora1.unet", "lora2.text", "lora3.strength", "strength", "steps"]
    axes = label_axes(
        [parse_axis(f"{setting}=0.4" if setting != "steps" else "steps=4") for setting in settings],
        loras,
    )
    assert [axis.captions[-1] for axis in axes[:5]] == [
        "zib 0.4", "demo unet 0.4", "demo-000300 text 0.4", "demo-000200 0.4", "strength 0.4"
    ]  # fmt: skip
    assert [axis.setting for axis in axes] == settings


def test_loras_of_one_name_and_those_that_are_not_there_keep_their_numbers() -> None:
    axes = [parse_axis(f"lora{i}.strength=0.4") for i in range(4)]
    loras = ["a/zib.safetensors", "b/zib.pt", "ink.safetensors"]
    captions = [axis.captions for axis in label_axes(axes, loras)]
    assert captions == [
        ["lora0.strength 0.4"], ["lora1.strength 0.4"], ["ink 0.4"], ["lora3.strength 0.4"]
    ]  # fmt: skip


def test_the_last_axis_runs_over_the_columns() -> None:
    axes = [parse_axis("steps=2,3"), parse_axis("seed=0:3")]
    cells = grid_cells(axes)
    assert cells[:4] == [
        {"steps": 2, "seed": 0},
        {"steps": 2, "seed": 1},
        {"steps": 2, "seed": 2},
        {"steps": 3, "seed": 0},
    ]
    images = [Image.new("L", (1, 1), int(10 * cell["steps"] + cell["seed"])) for cell in cells]
    rows = grid_rows(axes, images, "a cat")
    assert [row.label for row in rows] == ["a cat, steps 2", "a cat, steps 3"]
    assert [[image.getpixel((0, 0)) for image in row.images] for row in rows] == [
        [20, 21, 22],
        [30, 31, 32],
    ]
    assert rows[0].captions == ["seed 0", "seed 1", "seed 2"]
    (row,) = grid_rows(axes[1:], images[:3])
    assert row.label == "" and row.images == images[:3]
