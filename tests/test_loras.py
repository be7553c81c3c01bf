"""LoRA files on a model: how strengths are written, and runs that trained the whole model."""

from pathlib import Path

import pytest

from lora_core.errors import UserError
from lora_core.runs.loras import parse_lora, warn_of_whole_model


def test_strengths_are_read_as_documented() -> None:
    assert parse_lora("runs/a:0.8") == ("runs/a", 0.8, (0, 1))
    assert parse_lora("runs/a:unet=0.6,text=0.9") == ("runs/a", {"unet": 0.6, "text": 0.9}, (0, 1))
    assert parse_lora("C:/runs/a") == ("C:/runs/a", 1.0, (0, 1))
    with pytest.raises(UserError, match="--lora"):
        parse_lora("runs/a:strong")
    for text in ("", " ", ":0.5", " :unet=0.5"):  # else the current folder, as Path("") is
        with pytest.raises(UserError, match="names no file"):
            parse_lora(text)


def test_the_base_model_is_not_the_model_of_a_run_that_trained_it_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run" / "model"
    own.mkdir(parents=True)
    warn_of_whole_model("toy/model", tmp_path / "run")  # its token rows alone would be drawn with
    assert f"--model toy/model lacks that, give --model {own}" in capsys.readouterr().err
    warn_of_whole_model(str(own), tmp_path / "run")
    assert not capsys.readouterr().err
