"""Defaults < TOML < flags; errors name the nearest option."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from infer import Infer
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line


def parse(*words: str) -> Config:
    return parse_command_line(Config, list(words), prog="train.py", example="python train.py")


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "seed = 3\nbatch_size = 2\n[data]\nresolution = 64\n[[stages]]\nsteps = 5\n"
        '[[stages]]\nsteps = 6\ngroups = ["tokens"]\n'
    )
    config = parse(str(file), "--batch-size", "4", "--stages.1.steps", "7", "--data.images", "here")
    assert (config.seed, config.batch_size) == (3, 4)
    assert (config.data.resolution, config.data.images) == (64, "here")
    assert [s.steps for s in config.stages] == [5, 7] and config.stages[1].groups == ("tokens",)
    assert (
        config.keep == Config().keep
        and config.steps == 12
        and config.trains("tokens")
        and not config.trains("text_encoder")
    )


def test_key_value_flags() -> None:
    config = parse(
        "--optimizer.lr",
        "denoiser=1e-3",
        "tokens=2e-2",
        "--optimizer.betas",
        "tokens=0.9,0.95",
        "--loss-arg",
        "delta=0.1",
        "schedule=snr",
        "--optimizer.args",
        "safeguard_warmup=true",
        "d_coef=2",
        "--adapter.rank-pattern",
        "*.attn2.*=4",
    )
    assert config.optimizer.lr == {"denoiser": 1e-3, "tokens": 2e-2} and config.optimizer.betas == {
        "tokens": (0.9, 0.95)
    }
    assert config.loss_arg == {"delta": 0.1, "schedule": "snr"} and config.optimizer.args == {
        "safeguard_warmup": True,
        "d_coef": 2,
    }
    assert config.adapter.rank_pattern == {"*.attn2.*": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("False", False),
        ("True", True),
        ("false", False),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.1e-2", -1e-3),
        ("0.1", 0.1),
        ("3", 3),
        ("inf", math.inf),
        ("[1, 2]", [1, 2]),
        ("snr", "snr"),
        ("falsehood", "falsehood"),
        ("'False'", "False"),
    ],
)
def test_arguments_are_read_as_people_write_them(text: str, value: object) -> None:
    """decouple=False, as every guide has it, is not a text, which would be true."""
    found = parse("--optimizer.args", f"decouple={text}").optimizer.args["decouple"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.betas", "denoiser=0.9"], "two numbers B1,B2, got 0.9"),
        (["--optimizer.betas", "denoiser=0.9,0.9,1"], "two numbers"),
        (["--optimizer.lr", "denoiser=1", "tokens=1", "denoiser=2"], "denoiser is given 2 times"),
    ],
)
def test_pairs_that_say_too_much_or_too_little_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(*words)


def test_words_that_are_no_utf8_are_refused_escaped() -> None:
    for words in (["--out", "caf\udce9"], ["--data.caption", "caf\udce9"], ["caf\udce9.toml"]):
        with pytest.raises(
            UserError, match=r"the argument 'caf\\xe9(\.toml)?' has bytes that are not UTF-8"
        ):
            parse_command_line(Config, words, prog="train.py", example="")


def test_a_wrong_flag_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"the nearest flag is --data\.resolution"):
        parse("--data.resoluton", "3")


@pytest.mark.parametrize("cls", [Config, Infer])
def test_help_explains_every_flag(cls: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(cls, ["--help"], prog="x.py", example="python x.py --seed 3")
    shown = capsys.readouterr().out
    assert "python x.py --seed 3" in shown

    def flags(kind: type, prefix: str) -> Iterator[str]:
        for option in fields(kind):
            if is_dataclass(option.default):
                yield from flags(type(option.default), f"{prefix}{option.name}.")
            else:
                yield prefix + option.name

    for name in flags(cls, ""):
        if name == "data.subsets":  # tables of a TOML file, which have flags once there are some
            assert f"[[{name}]]" in shown
        elif not name.startswith(
            ("stages", "adapter", "optimizer", "source")
        ):  # groups built by a factory; renamed
            assert "--" + name.replace("_", "-") in shown, name
