"""A user's function in place of an op: named by LORA_CANDIDATE, used where it fits."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from lora_core import kernels
from lora_core.adapters.groups import may_group
from lora_core.config import Config
from lora_core.errors import UserError
from lora_core.kernels import OPS
from lora_core.kernels.candidate import read_candidate
from tests.conftest import learned, same

MINE = """
from lora_core.kernels import reference

def lora_linear(x, weight, bias, down, up, scale):
    return reference.lora_linear(x, weight, bias, down, up, scale)

def scaled(x, weight, bias, down, up, scale, magnitude=None, norm=None, drop=None):
    return reference.lora_linear(x, weight, bias, down, up, 2 * scale, magnitude, norm, drop)

def crashes(x, *rest):
    return x.nothing

def picky(x, *rest):
    return reference.lora_linear(x, *rest)

picky.supports = lambda x, *rest: None if x.ndim == 2 else f"x has {x.ndim} dimensions"

def lora_linaer(*args):
    return None
"""


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Sets LORA_CANDIDATE to a function of MINE, which is gone afterwards."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)

    def use(text: str, mode: str = "reference") -> str:
        value = text.replace("mine.py", str(file))
        monkeypatch.setenv("LORA_CANDIDATE", value)
        monkeypatch.setenv("LORA_KERNELS", mode)
        kernels.set_mode(None)
        return str(file)

    yield use
    monkeypatch.delenv("LORA_CANDIDATE", raising=False)
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    kernels.set_mode(None)
    kernels.current_mode()
    assert all(op.candidate is None for op in OPS.values())


def test_a_run_takes_the_candidate_and_records_it(
    config: Config, quick: None, candidate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with kernels.use_kernels("reference"):
        plain = learned(train.train(config))
    file = candidate("mine.py:lora_linear")
    run = train.train(replace(config, out=config.out + "mine"))
    said = capsys.readouterr()
    assert same(learned(run), plain)
    assert f"note: lora_linear is computed by {file}:lora_linear (LORA_CANDIDATE)" in said.err
    assert f"lora_linear was computed by {file}:lora_linear in " in said.out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kernel_candidate"] == {"op": "lora_linear", "function": f"{file}:lora_linear"}
    candidate("lora_linear=mine.py:scaled")
    assert not same(learned(train.train(replace(config, out=config.out + "scaled"))), plain)


def test_what_it_does_not_take_goes_to_the_usual_implementation_and_is_said_once(
    candidate: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    x, weight, bias, down, up, scale = OPS["lora_linear"].example(0)
    candidate("lora_linear=mine.py:picky")
    for _ in range(2):
        kernels.call("lora_linear", x, weight, bias, down, up, scale)
        kernels.call("lora_linear", x[0], weight, bias, down, up, scale, None, None, None)
    said = capsys.readouterr().err
    assert said.count("where that does not support the arguments: x has 3 dimensions") == 1
    found = OPS["lora_linear"].candidate
    assert found is not None and found.calls == 2
    # a function of six arguments is for plain LoRA alone
    candidate("mine.py:lora_linear")
    norm = kernels.call("dora_norm", weight, down, up, scale)
    args = x, weight, bias, down, up, scale, 2 * norm, norm
    expected = OPS["lora_linear"].reference(*args)
    assert torch.equal(kernels.call("lora_linear", *args), expected)
    assert "it takes 6 arguments, and some calls have 8" in capsys.readouterr().err
    found = OPS["lora_linear"].candidate
    assert found is not None and found.calls == 0
    assert found.describe_calls().startswith("warning: lora_linear was never computed by")


def test_layers_are_grouped_only_if_the_candidate_is_for_groups(candidate: Any) -> None:
    candidate("lora_linear=mine.py:picky", "triton")
    assert not may_group("cuda")
    candidate("lora_grouped=mine.py:crashes")
    assert may_group("cpu")
    candidate("snr_weighted_mse=mine.py:crashes", "triton")
    assert may_group("cuda")


def test_a_candidate_that_raises_is_an_error_with_its_line(candidate: Any) -> None:
    file = candidate("lora_linear=mine.py:crashes")
    said = rf"{file}:crashes raises AttributeError: .*nothing.*mine.py, line 11\)"
    with pytest.raises(UserError, match=said):
        kernels.call("lora_linear", *OPS["lora_linear"].example(0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mine.py:lora_linaer", "for the op 'lora_linaer', the nearest is 'lora_linear'; expected"),
        ("lora_linear=nowhere.py:fn", "nowhere.py:fn names no Python file"),
        ("lora_linear=mine.py:fn", "has no function 'fn'"),
        ("lora_linear=fused", "unknown candidate 'fused'; expected path/to/file.py:function"),
    ],
)
def test_a_wrong_candidate_is_told_as_the_run_begins(
    config: Config, candidate: Any, text: str, said: str
) -> None:
    candidate(text)
    with pytest.raises(UserError, match=said):
        train.train(config)
    with pytest.raises(UserError, match="for the op"):
        read_candidate("mine.py:fn", OPS)
