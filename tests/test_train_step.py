"""The benchmark of the training step: what is measured, and what is refused."""

import json
import statistics

import pytest
import torch

from benchmarks import contenders, train_step
from tests.tiny_problem import tiny

NAMES = ("frozen", "ours lora", "ours dora", "peft lora", "peft dora")


def test_unknown_contenders_are_refused(capsys):
    for bad in ("ours", "theirs lora", "peft lora graf", "ours full", "peft dora graph"):
        assert train_step.main(["--device", "cpu", "--contenders", bad]) == 2
        assert repr(bad) in capsys.readouterr().err


def test_numbers_below_one_and_idle_options_are_refused(capsys):
    for argv, said in (
        (["--batch", "0"], "--batch is 0"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--profile", "--json", "x"], "--json has no effect"),
    ):
        assert train_step.main(["--device", "cpu", "--model", "toy", *argv]) == 2
        assert said in capsys.readouterr().err


def test_memory_is_that_of_the_step():
    held = []

    def step():
        x = torch.ones(2**24)  # 64 MB
        y = x + 1
        held.append(y[:1].clone())

    large, small = (
        train_step.peak_memory(step, torch.device("cpu")),
        train_step.peak_memory(lambda: torch.ones(2**10), torch.device("cpu")),
    )
    if large is not None:  # Linux
        assert 120e6 < large < 160e6
        assert small < 16e6


def test_gradients_that_a_loop_leaves_are_not_taken_off_its_peak():
    weight, found = torch.zeros(3, requires_grad=True), []

    class Step:
        def __init__(self):
            self.parameters = [weight]

        def __call__(self):
            found.append(weight.grad)
            weight.grad = torch.ones(3)

    train_step.peak_memory(Step(), torch.device("cpu"))
    assert found == [None, None]


def test_each_contender_is_measured_over_the_frozen_one_of_its_words():
    assert train_step.frozen_contender("ours lora", NAMES) == "frozen"
    assert (
        train_step.frozen_contender("ours lora graph", (*NAMES, "frozen graph")) == "frozen graph"
    )
    assert train_step.frozen_contender("ours dora fused", (*NAMES, "frozen graph")) == "frozen"
    assert train_step.frozen_contender("ours dora", ("ours dora",)) == ""


def test_train_step_measures_all_contenders(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(contenders, "open_problem", lambda name, **_: tiny())
    assert (
        train_step.main(
            [
                "--device",
                "cpu",
                "--model",
                "toy",
                "--rounds",
                "3",
                "--json",
                str(tmp_path / "found.json"),
            ]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    (result,) = found["results"]
    assert list(result["contenders"]) == list(NAMES)
    assert result["rounds"] == 3
    assert (result["batch"], result["latents"], result["rank"]) == (2, 8, 4)
    frozen, ours = result["contenders"]["frozen"], result["contenders"]["ours lora"]
    paired = statistics.median(
        a / b for a, b in zip(ours["processor"], frozen["processor"], strict=True)
    )
    assert ours["ratio"] == pytest.approx(paired)
    assert f"{ours['ratio']:.3f}" in said
    assert ours["steps_per_second"] == pytest.approx(1 / statistics.median(ours["clock"]))
    assert all(name in said for name in NAMES)


def test_the_profile_names_what_is_called_more_often():
    problem = tiny()
    said = train_step.profile_difference(problem, ("frozen", "peft lora"), steps=1, rows=100)
    assert "peft lora beyond frozen" in said
    calls = {
        line.split()[0]: int(line.split()[-2])
        for line in said.splitlines()
        if line.endswith("calls")
    }
    assert calls["aten::linear"] == 2 * len(problem.paths)
    assert "aten::convolution" not in calls, "called as often as without adapters"
