"""Functions from files and from Python: found by name, called as they should be, and recorded in
config, header, card and table, so that they repeat the run or say why they cannot.
"""

import ast
import functools
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import train
from examples.my_loss import edges
from examples.my_optimizer import Lion
from lora_core import plugins
from lora_core.config import Config, OptimizerConfig
from lora_core.diffusion import losses
from lora_core.diffusion.losses import StepOutput, huber, mse
from lora_core.diffusion.noise import flow_schedule
from lora_core.errors import UserError
from lora_core.flags.command_line import parse_command_line
from lora_core.toml import from_table, read_toml, to_toml
from tests.conftest import learned, merged, same
from training.checks import config_checks


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


MINE = """
import math
import torch
from lora_core.optim.adamw import AdamW
from lora_core.diffusion.sampling import euler_ancestral

def error(step):
    return (step.out - step.target).pow(2).flatten(1).mean(1)

def weight(snr, *, gamma=5.0):
    return snr.clamp(max=gamma)

def density(u, mean=0.0):
    return torch.sigmoid(mean + torch.special.ndtri(u))

def schedule(step, steps, *, cycles=0.5):
    return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * (step / steps))))

def sampler(denoise, x, levels, *, noise):
    return euler_ancestral(denoise, x, levels, noise=noise)

class Own(AdamW):
    pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def options(names: dict[str, str], file: str) -> list[str]:
    """The flags of our entries, or of the functions of a file."""
    words = ["--weighting-arg", "gamma=3", "--noise.density-args", "mean=0.3"]
    words += ["--optimizer.schedule-args", "cycles=1.5"]
    for flag, name in names.items():
        words += [flag, f"{file}:{name}" if file else name]
    return words


def test_a_run_with_everything_from_a_file_is_that_with_our_entries(
    config: Config, quick: None, mine: str, tmp_path: Path
) -> None:
    """From the command line and from a TOML file, and again from the config.toml of the run."""
    ours = {"--weighting": "min_snr", "--noise.density": "logit_normal", "--loss": "mse"}
    ours |= {"--optimizer.schedule": "cosine", "--optimizer.name": "adamw"}
    theirs = {"--weighting": "weight", "--noise.density": "density", "--loss": "error"}
    theirs |= {"--optimizer.schedule": "schedule", "--optimizer.name": "Own"}
    (tmp_path / "plain.toml").write_text(to_toml(config))
    runs = []
    for number, words in enumerate((options(ours, ""), options(theirs, mine))):
        out = ["--out", f"{config.out}{number}"]
        given = [str(tmp_path / "plain.toml"), *out, *words]
        runs.append(train.train(parse_command_line(Config, given, prog="train.py", example="")))
    again = read_toml(runs[1] / "config.toml")
    assert (again.weighting, again.noise.density) == (f"{mine}:weight", f"{mine}:density")
    runs.append(train.train(replace(again, out=config.out + "again")))
    first, second, third = map(learned, runs)
    assert same(second, third)
    for name, tensor in first.items():  # the loss is another sum, in another order
        assert torch.allclose(tensor, second[name], rtol=1e-3, atol=1e-5), name
    plain = learned(train.train(config))
    assert not all(torch.allclose(plain[k], first[k], rtol=1e-3, atol=1e-5) for k in plain)


@pytest.mark.parametrize(
    ("text", "change", "said"),
    [
        ("def fn(snr):\n    return snr / missing", "weighting", r"'missing' .*bad.py, line 2\)"),
        ("def fn(snr):\n    return 1.0", "weighting", "returned float for snr"),
        ("def fn(snr):\n    return -snr", "weighting", "gives weights from -10000"),
        ("def fn(u):\n    return 2 * u", "density", "leaves the fractions 0..1"),
        ("def fn(u):\n    return u[:3]", "density", r"returned \[3\] for u \[1024\]"),
        ("def fn(u):\n    return u.nothing", "density", r"fn\(u\) and.*bad.py, line 2\)"),
        ("def fan(u):\n    return u", "density", r"has no function 'fn' \(nearest: fan\)"),
        ("x = 1\n\ny = x / 0", "density", r"cannot be run: ZeroDivisionError: .*bad.py, line 3"),
    ],
)
def test_a_wrong_function_of_a_file_is_one_sentence_with_its_line(
    config: Config, tmp_path: Path, text: str, change: str, said: str
) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    table: dict[str, Any] = {"weighting": f"{file}:fn"}
    if change == "density":
        table = {"noise": {"density": f"{file}:fn"}}
    with pytest.raises(UserError, match=said):
        config_checks.check_config(merged(config, table))


WRONG = """
def typo(step): return step.outt
def two(step, other): return step.out
def text(step): step.log("x", "high")
def wrapped(step): return step.out - step.target[:, :1, :3]
"""


def test_a_loss_that_fails_is_one_sentence_with_its_line(
    config: Config, quick: None, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    for name, said in (
        ("typo", r"wrong.py:typo fails: AttributeError: .*'outt' \(.*wrong.py, line 2\)"),
        ("two", r"is called as fn\(step\), and cannot be: missing a required argument: 'other'"),
        ("text", r"step.log\('x'\) got 'high'; expected a number or a tensor"),
    ):
        with pytest.raises(UserError, match=said):
            train.train(merged(config, {"loss": f"{file}:{name}", "overwrite": True}))
    with pytest.raises(
        UserError, match=r"typo is called as fn\(model, inputs, config, loss\), and"
    ):
        train.train(merged(config, {"step": f"{file}:typo"}))
    loss = plugins.load_from_file(str(file), "wrapped", "loss")
    for made in (losses.add_preservation(loss, 1.0), functools.partial(loss)):
        with pytest.raises(RuntimeError) as raised:
            loss(SimpleNamespace(out=torch.ones(1, 1, 4, 4), target=torch.ones(1, 1, 4, 4)))
        assert "wrong.py, line 5)" in plugins.describe_error(raised.value, made)


COMPILED = """
from __future__ import annotations
from dataclasses import dataclass
import torch

FACTOR = 3.0

@dataclass
class Own:
    power: float = 2.0
    def __call__(self, x):
        return FACTOR * torch.pow(x, self.power)

own = Own()
"""


def test_a_file_s_names_are_found_by_dataclasses_and_torch_compile(tmp_path: Path) -> None:
    file = tmp_path / "random.py"  # not the installed module of that name
    file.write_text(COMPILED)
    own = plugins.find_plugin(f"{file}:own", {}, "loss")
    compiled = torch.compile(own.__call__, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([1.0, 2.0])).tolist() == [3.0, 12.0]
    assert plugins.find_plugin(f"{file}:own", {}, "loss") is own


def test_a_changed_weighting_is_read_again_by_the_next_run(tmp_path: Path) -> None:
    """As in a notebook, whose process goes on."""
    file = tmp_path / "mine.py"
    level = flow_schedule().level(torch.tensor([0.5]))
    found = []
    for factor in (1, 3):
        file.write_text(f"def fn(snr):\n    return {factor} * snr")
        losses.check_weighting(f"{file}:fn", {})
        found.append(float(losses.loss_weights(f"{file}:fn", level, "sample")))
    assert found[1] == 3 * found[0]


@pytest.mark.parametrize("name", ["my_optimizer.py", "my_schedule.py", "my_loss.py"])
def test_an_example_has_at_most_ten_statements(name: str) -> None:
    tree = ast.parse((Path("examples") / name).read_text())
    count = 0
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_docstring:
            count += not isinstance(node, ast.Import | ast.ImportFrom)
    assert count <= 10


def test_the_example_optimizer_is_the_papers_lion(config: Config, quick: None) -> None:
    """arXiv 2302.06675 algorithm 2 in float64, and a run with it that resumes to the bit."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(theta.clone())
    optimizer = Lion([p], lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    m = torch.zeros_like(theta)
    for _ in range(5):
        g = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        c = 0.8 * m + 0.2 * g
        theta = theta - 0.01 * (c.sign() + 0.1 * theta)
        m = 0.95 * m + 0.05 * g
        torch.testing.assert_close(p.detach(), theta, rtol=1e-12, atol=1e-15)
    chosen = OptimizerConfig("examples/my_optimizer.py:Lion", weight_decay={"denoiser": 0.1})
    run = train.train(replace(config, optimizer=chosen))
    assert all(bool(tensor.isfinite().all()) for tensor in learned(run).values())


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
