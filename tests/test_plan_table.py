"""`train.py CONFIG --plan`: one screen, command lines to type, nothing read but configs."""

import shlex
from pathlib import Path

import pytest

import train
from lora_core.config import Config
from lora_core.flags.command_line import parse_command_line
from models.published import HUB_NAMES, PUBLISHED_MODELS
from models.published_configs import config_source


def test_the_table_of_a_model_that_has_configs_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "configs"
    for file in model.rglob("*.json"):
        if "tokenizer" not in str(file):
            place = folder / file.relative_to(model)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.read_text())
    words = ["--model", str(folder), "--data.resolution", "256", "--batch-size", "2"]
    words += ["--adapter.rank", "4"]
    assert train.main([*words, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 35 and max(map(len, lines[1:-6])) <= 100
    assert lines[1] == (
        "lora of rank 4, 2 images of 256 x 256 pixels, adamw, fp32, checkpointing none"
    )
    cards = [line for line in lines if " GB  " in line and "train.py" in line]
    assert [line.split()[0] for line in cards] == ["8", "12", "16", "24", "40", "80"]
    for line in cards:
        asked = shlex.split(line[line.index("python") :])[2:]
        config = parse_command_line(Config, asked, prog="train.py", example="")
        assert config.model == str(folder)


def test_published_models_need_no_download() -> None:
    assert set(HUB_NAMES.values()) == set(PUBLISHED_MODELS)
    for name in ("sdxl", "black-forest-labs/FLUX.1-dev"):
        assert (Path(config_source(name)) / "model_index.json").is_file()
    assert config_source("somebody/else") == "somebody/else"


def test_a_config_that_does_nothing_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--model", "sdxl", "--plan", "--weighting-arg", "gamma=5"]) == 2
    assert "weighting-arg" in capsys.readouterr().err


def test_one_process_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["--model", "toy/model", "--plan"]) == 2
    assert "start it with python train.py CONFIG --plan" in capsys.readouterr().err


def test_the_lines_to_type_have_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """Its options are part of the plan; so is the family of a published model, without the hub."""
    words = ["--preset", "object", "--model", "black-forest-labs/FLUX.2-klein-base-4B"]
    assert train.main([*words, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "peak: 10.3 GB" in said
    assert f"12 GB  10.3 GB  python train.py {' '.join(words)}\n" in said
