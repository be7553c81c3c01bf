"""The scripts' command line: help without torch, arguments of a replaced choice, and the names of
the package.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "numpy")
RUN = """
import runpy, sys
sys.argv = [{script!r}, *{words!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("status", end.code or 0, "imported", *sorted({heavy!r} & sys.modules.keys()))
"""


def run_fresh(script: str, *words: str) -> str:
    """The last line that a script prints in a fresh process, with the libraries it imported."""
    code = RUN.format(script=script, words=words, heavy=set(HEAVY))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["infer.py", "train.py"])
def test_help_imports_no_torch(script: str) -> None:
    assert run_fresh(script, "--help") == "status 0 imported"


def test_the_package_loads_its_names_when_they_are_used() -> None:
    code = (
        "import sys, lora_core; before = 'torch' in sys.modules; lora_core.patch; "
        "print(before, 'torch' in sys.modules, set(lora_core.__all__) <= set(dir(lora_core)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    import lora_core

    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        lora_core.pach  # noqa: B018


FILE = """
loss = "huber"
loss_arg = { delta = 0.2 }
weighting = "min_snr"
weighting_arg = { gamma = 3.0 }
[noise]
density = "logit_normal"
density_args = { mean = 1.0 }
[optimizer]
name = "prodigy"
lr = { denoiser = 3.0 }
args = { d0 = 1e-4 }
schedule = "polynomial"
schedule_args = { power = 2 }
[[stages]]
lr = { denoiser = 2.0 }
"""


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return str(path)


def parse(*words: str) -> Config:
    return parse_command_line(Config, words, prog="train.py", example="")


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (("--loss", "l1"), ["loss_arg"]),
        (("--weighting", "none"), ["weighting_arg"]),
        (("--noise.density", "uniform"), ["noise.density_args"]),
        (("--optimizer.schedule", "constant"), ["optimizer.schedule_args"]),
        (("--optimizer.name=adamw",), ["optimizer.args", "optimizer.lr", "stages.0.lr"]),
        (("--optimizer.name", "schedulefree.ProdigyScheduleFree"), ["optimizer.args"]),
        (("--optimizer.name", "prodigy", "--loss", "huber"), []),  # as in the file
        (("--seed", "3"), []),
    ],
)
def test_arguments_go_with_the_choice_that_a_flag_replaces(
    toml: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], left_out: list[str]
) -> None:
    before, config = parse(toml), parse(toml, *words)
    said = capsys.readouterr().err
    options = {
        "loss_arg": lambda c: c.loss_arg,
        "weighting_arg": lambda c: c.weighting_arg,
        "noise.density_args": lambda c: c.noise.density_args,
        "optimizer.args": lambda c: c.optimizer.args,
        "optimizer.lr": lambda c: c.optimizer.lr,
        "optimizer.schedule_args": lambda c: c.optimizer.schedule_args,
        "stages.0.lr": lambda c: c.stages[0].lr,
    }
    for option, read in options.items():
        assert read(config) == ({} if option in left_out else read(before)), option
        assert (option in said) == (option in left_out)


def test_arguments_that_are_given_stay(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(
        toml, "--optimizer.name", "adamw", "--optimizer.args", "eps=1e-6",
        "--optimizer.lr", "denoiser=1e-3", "--stages.0.lr=denoiser=1e-4", "--loss", "smooth_l1",
        "--loss_arg", "delta=0.5",
    )  # fmt: skip
    assert config.optimizer.args == {"eps": 1e-6} and config.optimizer.lr == {"denoiser": 1e-3}
    assert config.stages[0].lr == {"denoiser": 1e-4} and config.loss_arg == {"delta": 0.5}
    assert not capsys.readouterr().err
    without_file = parse("--optimizer.name", "prodigy", "--optimizer.args", "d0=1e-4")
    assert without_file.optimizer.args == {"d0": 1e-4}


# ---------------------------------------------------------------- rates of all groups, stages


@pytest.mark.parametrize(
    ("words", "lr"),
    [
        (["1e-4"], {"all": 1e-4}),
        (["tokens=1e-3", "1e-4"], {"tokens": 1e-3, "all": 1e-4}),
        (["denoiser=2"], {"denoiser": 2.0}),
    ],
)
def test_a_number_alone_is_a_rate_of_all_groups(words: list[str], lr: dict[str, float]) -> None:
    assert parse("--optimizer.lr", *words).optimizer.lr == lr
    assert parse("--stages.0.lr", *words).stages[0].lr == lr
    assert parse("--optimizer.weight-decay", *words).optimizer.weight_decay == lr
    with pytest.raises(UserError, match="expected KEY=VALUE, got 3"):
        parse("--adapter.rank-pattern", "3")  # a table of globs has no such number


def test_a_file_has_a_number_for_all_groups(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nlr = 1e-4\n[[stages]]\nlr = 2\n")
    config = parse(str(path))
    assert config.optimizer.lr == {"all": 1e-4} and config.stages[0].lr == {"all": 2.0}
    path.write_text("[[stages]]\nsteps = 1\n[[stages]]\nlr = true\n")
    with pytest.raises(UserError, match=r"stages.1.lr is True, expected a number for all groups"):
        parse(str(path))


def test_stages_are_added_by_flags(toml: str) -> None:
    words = ("--stages.1.steps", "200", "--stages.1.groups", "denoiser", "--stages.2.lr", "1e-5")
    config = parse(toml, *words)
    assert [stage.steps for stage in config.stages] == [1000, 200, 1000]
    assert config.stages[0].lr == {"denoiser": 2.0} and config.stages[2].lr == {"all": 1e-5}
    assert len(parse("--stages.1.steps=7").stages) == 2


def test_stages_are_added_to_none(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("stages = []\n")
    assert [stage.steps for stage in parse(str(path), "--stages.0.steps", "9").stages] == [9]


def test_a_gap_between_stages_is_refused(toml: str) -> None:
    with pytest.raises(UserError, match=r"--stages.3 leaves a gap: .* the next is --stages.1"):
        parse(toml, "--stages.3.steps", "5")
