"""The recipe in a PNG: text of another kind is refused in one sentence."""

from pathlib import Path

import pytest
from PIL import Image

import infer
from lora_core.runs.image_recipe import CHUNK
from lora_core.runs.pictures import save_png


def test_an_image_without_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert infer.main(["--from", str(tmp_path / "plain.png")]) == 2
    assert "no recipe" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["{", "[]", "3", '{"prompt": 3}', '{"foo": 1}', "[" * 100_000])
def test_a_recipe_of_another_kind_is_refused(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "other.png", {CHUNK: recipe})
    assert infer.main(["--from", str(tmp_path / "other.png")]) == 2
    assert "other.png: its recipe" in capsys.readouterr().err
