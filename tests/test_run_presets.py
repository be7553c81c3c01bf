"""`--preset`: a recipe for each family, under the config file and the flags."""

import itertools
import re
from pathlib import Path

import pytest

import train
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line, take_flag
from lora_core.toml import from_table, layer_tables, read_toml
from tests import tiny_flux, tiny_flux2, tiny_sd3, tiny_sdxl
from training.checks.config_checks import check_config
from training.run_presets import (
    FOLDER,
    PRESETS,
    fit_intervals,
    preset_file,
    read_preset,
    take_preset,
)

FAMILIES = ("sd", "sdxl", "flux", "sd3", "flux2")
TOY = "toy/model"


def parse(*words: str) -> Config:
    preset, rest = take_preset(words)
    return parse_command_line(Config, rest, prog="train.py", example="", preset=preset)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_that_says_what_it_needs(family: str, name: str) -> None:
    file = preset_file(name, family)
    config = read_toml(file)
    assert config == from_table(read_preset(name, family))
    assert config.save_every * config.keep == config.steps  # all checkpoints stay
    assert config.data.buckets and config.optimizer.name == "prodigy"
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(re.match(r"# Memory: \d+(\.\d)? GB", line) for line in head)
    assert any(line.startswith("# Time: ") for line in head)
    assert f"--preset {name}" in "".join(head)


def test_there_is_no_other_preset() -> None:
    names = itertools.product(FAMILIES, PRESETS)
    files = {file.stem for file in FOLDER.iterdir()}
    assert files == {"_".join(pair) for pair in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_is_that_of_the_models_family(family: str, tmp_path: Path, model: Path) -> None:
    path = {"sd": model}.get(family, tmp_path)
    if family != "sd":
        makers = {"sdxl": tiny_sdxl, "flux": tiny_flux, "sd3": tiny_sd3, "flux2": tiny_flux2}
        makers[family].save(path)
    file, rest = take_preset(["--model", str(path), "--preset=style", "--seed", "3"])
    assert file == preset_file("style", family)
    assert rest == ["--model", str(path), "--seed", "3"]


def test_a_config_file_names_the_model_and_wins(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f'model = "{model}"\nbatch_size = 7\n[adapter]\nalpha = 2.0\n')
    config = parse(str(file), "--preset", "object", "--adapter.rank", "5")
    preset = read_toml(preset_file("object", "sd"))
    assert (config.model, config.batch_size) == (str(model), 7)
    assert (config.adapter.rank, config.adapter.alpha) == (5, 2.0)
    assert config.adapter.targets == preset.adapter.targets and config.stages == preset.stages


def test_without_a_file_the_preset_is_the_config() -> None:
    config = parse("--preset", "character", "--model", TOY, "--seed", "4")
    assert config == parse(str(preset_file("character", "sd")), "--model", TOY, "--seed", "4")


@pytest.mark.parametrize("by_flag", [True, False])
def test_another_optimizer_does_not_get_the_arguments_of_prodigy(
    by_flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "character", "--model", TOY]
    if by_flag:
        words += ["--optimizer.name", "adamw"]
    else:
        file = tmp_path / "mine.toml"
        file.write_text('[optimizer]\nname = "adamw"\n')
        words.insert(0, str(file))
    config = parse(*words)
    assert (config.optimizer.name, config.optimizer.args) == ("adamw", {})
    assert "optimizer.args for prodigy; left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--preset", "charakter"], "no preset 'charakter', the nearest is 'character'"),
        (["--preset", "style"], "depends on the model; name one with --model"),
        (["--preset"], "--preset has no value; write --preset VALUE"),
        (["--preset", "--seed", "3"], "--preset has no value"),
    ],
)
def test_wrong_presets_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        take_preset(words)


def test_a_family_without_presets_is_refused() -> None:
    with pytest.raises(UserError, match="no preset 'style' for models of the family mine"):
        preset_file("style", "mine")


def test_tables_are_layered_option_by_option() -> None:
    below = {"a": 1, "t": {"x": 1, "y": [1, 2]}, "stages": [{"steps": 1}, {"steps": 2}]}
    above = {"t": {"y": [3]}, "stages": [{"steps": 5}], "b": 2}
    layered = layer_tables(below, above)
    assert layered == {"a": 1, "t": {"x": 1, "y": [3]}, "stages": [{"steps": 5}], "b": 2}
    assert below["t"] == {"x": 1, "y": [1, 2]}


def test_a_flag_is_taken_out_of_the_words() -> None:
    assert take_flag("my-flag", ["a", "--my_flag=x", "--b", "c"]) == ("x", ["a", "--b", "c"])
    assert take_flag("my-flag", ["--my-flag", "1", "--my-flag", "2"]) == ("2", [])
    assert take_flag("my-flag", ["a"]) == (None, ["a"])


def test_a_run_with_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded model, shortened; the preset's file is named, and its word is learned."""
    words = f"--preset object --model {TOY} --data.images toy/concepts/trilo --out {tmp_path / 'r'}"
    short = "--stages.0.steps 1 --stages.1.steps 1 --samples.steps 1 --data.resolution 64"
    assert train.main([*words.split(), *short.split(), "--precision", "fp32"]) == 0
    assert "sd_object.toml; the config file and flags win over it" in capsys.readouterr().out
    assert (tmp_path / "r" / "r_emb.safetensors").is_file()


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_memory_of_a_preset_is_that_of_its_plan(
    family: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = preset_file(name, family)
    assert train.main([str(file), "--data.images", "toy/concepts/zib", "--plan"]) == 0
    (peak,) = re.findall(r"peak: ([\d.]+) GB", capsys.readouterr().out)
    assert f"# Memory: {peak} GB" in file.read_text()


def test_a_short_run_has_no_warning_about_what_its_preset_brought(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", TOY, "--stages.0.steps", "20", "--stages.1.steps", "20"]
    words += ["--data.images", TOY, "--data.caption", "a TOK"]

    def warned(*further: str) -> str:
        preset, rest = take_preset([*further, *words, "--preset", "character"])
        config = parse_command_line(Config, rest, prog="train.py", example="", preset=preset)
        capsys.readouterr()
        check_config(fit_intervals(config, rest))
        return capsys.readouterr().err

    assert warned() == ""
    file = tmp_path / "mine.toml"
    file.write_text("save_every = 200\n")
    said = "warning: --save-every 200 has no effect in a run of 40 steps\n"
    assert warned(str(file)) == said
    words += ["--samples.every=50"]
    assert warned() == "warning: --samples.every 50 has no effect in a run of 40 steps\n"
