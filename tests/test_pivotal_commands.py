"""cloneofsimo's commands by their words: help, one sentence for a mistake, and the exit status."""

from functools import partial
from pathlib import Path

import pytest

from lora_core.config import Config
from training.translation.pivotal_commands import (
    run_ppim_command,
    run_pti_command,
    run_script_command,
)


def never(config: Config) -> Path:
    raise AssertionError("training began")


COMMANDS = {
    "lora_pti": partial(run_pti_command, train=never),
    "lora_ppim": run_ppim_command,
    "script": partial(run_script_command, "train_lora_dreambooth.py", train=never),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words, status", [([], 2), (["--help"], 0), (["-h", "x"], 0)])
def test_the_help_is_printed_without_words_and_when_asked_for(
    name: str, words: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[name](words) == status
    said = capsys.readouterr()
    assert name == "script" or name in said.out
    assert "\n" in said.out and not said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS[name](["--gradient_acumulation_steps=4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "gradient_acumulation_steps" in line


def test_training_gets_the_config_of_the_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training is given the translated config; what it raises is the command's error."""
    asked = []

    def train(config: Config) -> Path:
        asked.append(config)
        raise KeyboardInterrupt

    words = ["--pretrained_model_name_or_path=toy/model", "--instance_data_dir=toy/concepts/zib"]
    words += [f"--output_dir={tmp_path / 'out'}", "--lora_rank=3", "--placeholder_tokens=<s1>"]
    assert run_pti_command(words, train) == 130
    (config,) = asked
    assert (config.model, config.adapter.rank, config.out) == (
        "toy/model",
        3,
        str(tmp_path / "out"),
    )
    assert "lora_rank" in capsys.readouterr().out
