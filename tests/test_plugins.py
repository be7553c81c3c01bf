"""A loss or a step that is handed over in Python: its file and name are in config, header, card and
table, and repeat the run or say why they cannot.
"""

import functools
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

import train
from examples.my_loss import edges
from lora_core import plugins
from lora_core.config import Config
from lora_core.diffusion import losses
from lora_core.diffusion.losses import StepOutput, huber, mse
from lora_core.errors import UserError
from lora_core.toml import from_table
from tests.conftest import learned, same


def cubed(step: StepOutput, *, power: int = 3) -> Tensor:
    return (step.out - step.target).abs().pow(power).flatten(1).mean(1)


def doubled(model: Any, x: Any, config: Any, loss: Any) -> Tensor:
    return 2 * train.training_step(model, x, config, loss)


@functools.wraps(cubed)
def wrapped(step: StepOutput) -> Tensor:
    return cubed(step)


class Weighted:
    def __call__(self, step: StepOutput) -> Tensor:
        return mse(step)


def inside() -> Any:
    def loss(step: StepOutput) -> Tensor:
        return mse(step)

    return loss


HERE = "tests/test_plugins.py"


@pytest.mark.parametrize(
    ("loss", "name", "args"),
    [
        (huber, "huber", {}),
        (functools.partial(huber, delta=0.3), "huber", {"delta": 0.3}),
        (edges, "examples/my_loss.py:edges", {}),
        (functools.partial(edges, strength=1.0), "examples/my_loss.py:edges", {"strength": 1.0}),
        (cubed, f"{HERE}:cubed", {}),
        (lambda step: mse(step), f"<lambda of {HERE}>", {}),
        (inside(), f"<inside.loss of {HERE}>", {}),
        (wrapped, f"<cubed of {HERE}>", {}),  # the file's `cubed` is another function
        (Weighted(), "<Weighted object of tests.test_plugins>", {}),
        (functools.partial(cubed, power=[3]), "<partial object of functools>", {}),
    ],
    ids=[
        "row",
        "bound row",
        "file",
        "bound",
        "here",
        "lambda",
        "inner",
        "wrapped",
        "object",
        "unwritable",
    ],
)
def test_a_loss_is_recorded_by_file_and_name(loss: Any, name: str, args: dict[str, Any]) -> None:
    assert plugins.name_and_arguments(loss, losses.LOSSES) == (name, args)
    if name.startswith("<"):
        with pytest.raises(UserError, match="was passed in Python and is in no file"):
            plugins.find_plugin(name, losses.LOSSES, "loss", args)
    else:
        assert plugins.find_plugin(name, losses.LOSSES, "loss", args) is not None


def test_a_function_of_a_program_or_a_notebook_is_not_found_again(tmp_path: Path) -> None:
    for scope in (
        {"__name__": "__main__", "__file__": str(tmp_path / "program.py")},
        {"__name__": "__main__"},
    ):
        exec("def loss(step): return step", scope)
        assert plugins.name_function(scope["loss"]).startswith("<loss of ")
    away: dict[str, Any] = {"__name__": "away", "__file__": str(tmp_path / "away.py")}
    exec("def loss(step): return step", away)
    assert plugins.name_function(away["loss"]) == f"{tmp_path / 'away.py'}:loss"


def test_the_config_of_a_run_repeats_it(
    config: Config, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train.train(config, loss=functools.partial(cubed, power=4), step=doubled)
    out = capsys.readouterr().out
    written = from_table(tomllib.loads((run / "config.toml").read_text()))
    assert (written.loss, written.loss_arg, written.step) == (
        f"{HERE}:cubed",
        {"power": 4},
        f"{HERE}:doubled",
    )
    assert f"loss: {HERE}:cubed of epsilon" in out
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert (
            f"{HERE}:cubed" in file.metadata()["lora_core.config"]
            and f"{HERE}:doubled" in file.metadata()["lora_core.config"]
        )
    card = (run / "README.md").read_text()
    assert f"{HERE}:cubed" in card and f"{HERE}:doubled" in card
    again = train.train(replace(written, out=config.out + "again"))
    assert same(learned(again), learned(run)) and not same(
        learned(run), learned(train.train(replace(config, out=config.out + "other")))
    )


def test_a_run_that_cannot_be_repeated_says_so(config: Config, quick: None) -> None:
    run = train.train(config, loss=lambda step: mse(step))
    written = from_table(tomllib.loads((run / "config.toml").read_text()))
    assert written.loss == f"<test_a_run_that_cannot_be_repeated_says_so.lambda of {HERE}>"
    card = (run / "README.md").read_text()
    assert "came from Python" in card and "&lt;test_a_run" in card and "repeats it" not in card
    with pytest.raises(UserError, match="--loss is <test_a_run"):
        train.train(replace(written, overwrite=True))
    with pytest.raises(UserError, match="--step is <"):
        train.train(replace(config, overwrite=True, step="<lambda of somewhere>"))
    with pytest.raises(UserError, match="takes no argument 'delta'"):
        train.train(replace(config, overwrite=True, loss_arg={"delta": 1}), loss=mse)
