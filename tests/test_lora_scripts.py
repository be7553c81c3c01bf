"""The scripts of cloneofsimo's training_scripts, by the lines of its .sh files."""

import contextlib
from pathlib import Path

import pytest

import train
from lora_core.errors import UserError
from lora_core.toml import read_toml
from tests import readme_lines
from tests.installed_commands import ROOT, typed_words
from tests.readme_lines import append_flags
from tests.test_lora_pti import TOY, read_as_cloneofsimo, variables
from training.translation.lora_scripts import SCRIPTS, SHARED, translate_script
from training.translation.pivotal_commands import run_script_command


def run_line(line: str, cwd: Path, images: Path) -> Path:
    """The finished run of `accelerate launch SCRIPT FLAGS`, carried out in this process."""
    (words,) = typed_words(line, cwd, variables(images))
    assert words[0] == "launch" and (ROOT / "examples/cloneofsimo" / words[1]).is_file()
    with contextlib.chdir(cwd):
        assert run_script_command(words[1], words[2:], train.train) == 0
    return cwd / "exps/output_dsn"


@pytest.mark.parametrize(
    "line, groups, rates",
    [
        (readme_lines.DREAMBOOTH, ("denoiser",), {"denoiser": 1e-4}),
        (
            readme_lines.DREAMBOOTH_TEXT,
            ("denoiser", "text_encoder"),
            {"denoiser": 1e-4, "text_encoder": 5e-5},
        ),
    ],
)
def test_dreambooth_with_and_without_the_text_encoder(
    line: str,
    groups: tuple[str, ...],
    rates: dict[str, float],
    photos: Path,
    tmp_path: Path,
    quick: None,
) -> None:
    folder = run_line(append_flags(line, "--max_train_steps=2 --resolution=64"), tmp_path, photos)
    config = read_toml(folder / "config.toml")
    assert config.stages[0].groups == groups and config.optimizer.lr == rates
    assert config.data.captions == "one" and config.optimizer.schedule == "constant"
    loras, embeds = read_as_cloneofsimo(folder / "lora_weight.safetensors")
    assert set(loras) == {"unet", *(["text_encoder"] if len(groups) > 1 else [])} and not embeds


def test_run_lorpt_trains_a_token_and_then_the_adapters(
    photos: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "--max_train_steps=4 --unfreeze_lora_step=2 --resolution=64 --initializer_token=red"
    folder = run_line(append_flags(readme_lines.LORPT, short), tmp_path, photos)
    stages = read_toml(folder / "config.toml").stages
    assert [stage.groups for stage in stages] == [("tokens",), ("denoiser", "text_encoder")]
    assert "--stochastic_attribute" in capsys.readouterr().out
    _, embeds = read_as_cloneofsimo(folder / "lora_weight.safetensors")
    assert set(embeds) == {"<krk>"}
    whole = typed_words(readme_lines.LORPT, tmp_path, variables(photos))[0][2:]
    config = translate_script("train_lora_w_ti.py", whole).config
    assert [stage.steps for stage in config.stages] == [1500, 3500]


def test_every_flag_of_the_scripts_is_answered(photos: Path) -> None:
    for script, own in SCRIPTS.items():
        start = [str(TOY), str(photos), "--max_train_steps=9", "--learning_rate=1e-4"]
        start += ["--instance_prompt=a", "--placeholder_token=<a>", "--initializer_token=b"]
        start = [
            word for word in start if word.partition("=")[0][2:] in SHARED | own or "=" not in word
        ]
        for name, default in (SHARED | own).items():
            value = str(not default) if isinstance(default, bool) else "3"
            value = {"lr_scheduler": "linear", "learnable_property": "style"}.get(name, value)
            words = [word for word in start if not word.startswith(f"--{name}=")]
            words = (
                words
                if name in ("instance_data_dir", "pretrained_model_name_or_path")
                else [*words, f"--{name}={value}"]
            )
            try:
                table = translate_script(script, words).table
            except UserError as error:
                assert f"--{name}" in str(error), f"{name}: {error}"
            else:
                assert f"--{name}"[:34] in table, name


def test_what_is_missing_is_one_sentence(photos: Path) -> None:
    start = [str(TOY), str(photos), "--instance_prompt=a"]
    for words, said in (
        (["--learning_rate=1e-4"], "give --max_train_steps"),
        (["--max_train_steps=3"], "it has no default there; give one, such as 1e-4"),
        (["--learning_rate=1", "--max_train_steps=3", "--resume_unet=a.pt"], "--from-lora FILE"),
        (["--with_prior_preservation", "--max_train_steps=3"], "give --class_prompt"),
    ):
        with pytest.raises(UserError, match=said):
            translate_script("train_lora_dreambooth.py", [*start, *words])


def test_the_advice_about_an_occupied_folder_can_be_followed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.toml").touch()
    words = [str(TOY), str(photos), str(out), "--instance_prompt=a photo", "--learning_rate=1e-4"]
    words += ["--max_train_steps=2"]
    script = "train_lora_dreambooth.py"
    assert run_script_command(script, words, train.train) == 2
    said = capsys.readouterr()
    assert not said.out and "already holds a run; pass --resume" in said.err
    assert translate_script(script, [*words, "--overwrite"]).config.overwrite
    assert translate_script(script, [*words, "--resume", "--resume-anyway"]).config.resume_anyway
    other = translate_script(script, [*words, "--out", str(tmp_path / "other")])
    assert other.config.out == str(tmp_path / "other") and "overwrite" not in other.table
