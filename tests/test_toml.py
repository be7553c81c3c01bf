"""A config from TOML and back; a wrong file is one sentence that names the nearest option."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from infer import Infer
from lora_core.config import AdapterConfig, Config, OptimizerConfig, Stage
from lora_core.errors import UserError
from lora_core.toml import flatten_table, from_table, read_toml, to_table, to_toml

ROOT = Path(__file__).parent.parent


def test_a_config_survives_its_own_toml() -> None:
    stages = (
        Stage(steps=3, lr={"denoiser": 1e-4}, schedule="cosine", low=0.1),
        Stage(groups=("tokens", "denoiser")),
    )
    config = replace(
        Config(),
        stages=stages,
        loss_arg={"delta": 0.5},
        optimizer=OptimizerConfig(betas={"tokens": (0.9, 0.99)}, args={"d_coef": 2.0}),
        adapter=AdapterConfig(rank_pattern={"*.to_q": 4}, targets=("a", "b")),
    )
    assert from_table(tomllib.loads(to_toml(config))) == config
    assert from_table({}) == Config() and from_table(
        to_table(Infer(lora=("a:1", "b"))), Infer
    ) == Infer(lora=("a:1", "b"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_committed_configs_are_read(file: Path) -> None:
    config = read_toml(file)
    assert config.model and config.steps > 0
    assert from_table(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("resoluton = 3", r"resoluton.*did you mean data\.resolution"),
        ("xyzzy = 3", "xyzzy.*known are"),
        ("[data]\nresoluton = 3", r"data\.resoluton.*data\.resolution"),
        ("[[stages]]\nstep = 3", r"stages\.0\.step.*stages\.0\.steps"),
        ("seed = 'x'", "seed|int"),
        ("seed = 1.5", "1.5"),
        ("[data]\nflip = 1", "true or false"),
        ("[data]\ncrop = 'middle'", "middle"),
        ("[[stages]]\ngroups = ['unet']", "unet"),
        ("seed = ", "not a TOML"),
        ("[stages]\nsteps = 3", r"\[\[stages\]\] in double brackets"),
        ("stages = 3", r"stages is 3, expected a list of tables"),
        ("stages = [3]", r"\[\[stages\]\] in double brackets"),
        ("data = 3", r"data is 3, expected a table; write \[data\]"),
        ("seed = " + "[" * 5000, "not a TOML"),
    ],
)
def test_wrong_toml_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.toml") as error:
        read_toml(tmp_path / "bad.toml")
    assert re.search(sentence, str(error.value)) and "\n" not in str(error.value)


def test_a_flat_table_names_every_option_with_dots() -> None:
    table = {"a": 1, "b": {"c": [2, 3], "d": {}}, "e": [{"f": 4}, {"f": []}]}
    assert flatten_table(table) == {"a": 1, "b.c": [2, 3], "e.0.f": 4, "e.1.f": []}


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        read_toml(tmp_path / "nowhere.toml")
