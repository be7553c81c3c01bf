"""The benchmark of kernels as a program on tiny layers.

Its rows, ratios and JSON, candidates right and wrong, and the table that --tune writes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernels as program
from benchmarks import laws, timing
from benchmarks.cases import LAYERS, Setting, copy_arguments, make_cases
from benchmarks.measure import DeviceRates
from lora_core.kernels import OPS, choice, reference, steps, winners

ROOT = Path(__file__).parent.parent
TINY = ["--device", "cpu", "--shape", "16,24,24", "--rank", "4", "--rounds", "3"]
CANDIDATES = """
from lora_core.kernels import reference

def right(x, weight, bias, down, up, scale, magnitude=None, norm=None, drop=None):
    return reference.lora_linear(x, weight, bias, down, up, scale, magnitude, norm, drop)

def wrong(x, weight, bias, down, up, scale, magnitude=None, norm=None, drop=None):
    return reference.lora_linear(x, weight, bias, down, up, 1.05 * scale, magnitude, norm, drop)

def frozen_up(x, weight, bias, down, up, scale, magnitude=None, norm=None, drop=None):
    return reference.lora_linear(x, weight, bias, down, up.detach(), scale, magnitude, norm, drop)

def crashes(*args):
    raise IndexError("tile")
"""


@pytest.fixture
def main(capsys, monkeypatch, tmp_path):
    """Runs the program in this process, with few repeats: (exit status, stdout, stderr)."""
    monkeypatch.setattr(timing, "FLOOR", 0.0)
    monkeypatch.setattr(program, "measure_device_rates", lambda setting: DeviceRates(1e10, 1e11))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run(*argv: str) -> tuple[int, str, str]:
        status = program.main(list(argv))
        out = capsys.readouterr()
        return status, out.out, out.err

    yield run
    monkeypatch.undo()
    choice.reload_winners()


def test_the_command_prints_ratios_to_peft_and_stores_them(tmp_path):
    """As its users start it."""
    file = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels",
        "--quick",
        *TINY[:-2],
        "--json",
        str(file),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (
        "lora_linear LoRA: ours / peft" in done.stdout
        and "lora_linear DoRA: ours / peft" in done.stdout
    )
    stored = json.loads(file.read_text())
    assert stored["command"].startswith("python -m benchmarks.kernels --quick")
    assert {
        "machine",
        "date",
        "device",
        "dtype",
        "rank",
        "rates",
        "cases",
        "summary",
    } <= stored.keys()
    row = stored["cases"][0]
    assert (row["op"], row["case"]) == ("lora_linear", "LoRA 16,24,24")
    assert row["contenders"].keys() == {"ours", "peft", "frozen"}
    assert row["to peft"]["peft"] == 1.0 and row["to peft"]["ours"] > 0
    assert (
        row["contenders"]["peft"]["memory"]
        > row["contenders"]["ours"]["memory"]
        > row["contenders"]["frozen"]["memory"]
        == 0
    )


def test_every_op_has_a_row_with_errors_and_all_it_was_asked_for(main, tmp_path):
    file = tmp_path / "all.json"
    status, out, _ = main(*TINY, "--json", str(file))
    assert status == 0, out
    stored = json.loads(file.read_text())
    assert {row["op"] for row in stored["cases"]} == set(OPS)
    assert "left out" in out  # the triton implementations
    for row in stored["cases"]:
        found = row["contenders"]
        assert found.keys() >= {"reference", "ours"} | (
            {"fused"} if OPS[row["op"]].fused else set()
        )
        if row["minimum"]:
            assert 0 < found["reference"]["error"] < 0.01
            assert (
                found["reference"]["over minimum"] >= 1 or row["op"] == "lora_grouped"
            )  # the frozen weights of a group are read in one call each
            assert found["reference"]["roofline"] > 0
    assert {"lora_linear LoRA", "lora_linear DoRA", "lora_grouped LoRA", "dora_norm"} <= stored[
        "summary"
    ].keys()


@pytest.mark.parametrize(
    "name, said",
    [
        ("wrong", r"the error 5.0e-02 to float64 in gradient of (down|x|up)"),
        ("frozen_up", "gives no gradient of up"),
        ("crashes", "IndexError: tile"),
    ],
)
def test_a_wrong_candidate_is_refused_with_its_error(main, tmp_path, name, said):
    file = tmp_path / "mine.py"
    file.write_text(CANDIDATES)
    status, _, err = main(*TINY, "--candidate", f"{file}:{name}")
    assert status == 2
    assert "the candidate is refused: at lora_linear LoRA 16,24,24 it" in err
    assert re.search(said, err), err


def test_a_right_candidate_is_timed_next_to_the_others(main, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CANDIDATES)
    status, out, err = main(
        *TINY, "--candidate", f"{file}:right", "--json", str(tmp_path / "out.json")
    )
    assert status == 0, err
    assert all(
        "candidate" in row["contenders"]
        for row in json.loads((tmp_path / "out.json").read_text())["cases"]
    )
    assert out.count("\ncandidate ") == 2


def test_more_shapes_than_dynamo_keeps_are_compiled_and_what_it_cannot_trace_is_left_out(
    main, monkeypatch, tmp_path
):
    """backend="eager": what dynamo traces, run as it is."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compiler(function, backend="eager", **how)
    )

    def untraceable(*args):
        torch._dynamo.graph_break()
        return steps.prodigy_step(*args)

    monkeypatch.setitem(OPS, "prodigy_step", replace(OPS["prodigy_step"], reference=untraceable))
    shapes = [f"{rows},8,8" for rows in range(2, 3 + torch._dynamo.config.recompile_limit)]
    file = tmp_path / "compiled.json"
    options = ["--rank", "2", "--rounds", "1", "--op", "keyed_dropout", "prodigy_step"]
    status, out, err = main("--compile", "--json", str(file), "--shape", *shapes, *options)
    assert status == 0, out + err
    stored = json.loads(file.read_text())
    compiled = ["compile" in row["contenders"] for row in stored["cases"]]
    assert compiled == [True] * len(shapes) + [False]
    assert "prodigy_step its example: torch.compile of the reference is left out, it raises" in out


def test_tuning_writes_the_rows_that_choose_reads(main, tmp_path):
    status, _, err = main(*TINY, "--tune", "--op", "lora_linear", "--dtype", "bf16")
    assert status == 0, err
    table = winners.read_winners(winners.cache_file())["cpu"]
    group = table.rows["lora_linear", "bfloat16"]
    assert set(group) == {"lora 16,32,32 rank 4", "dora 16,32,32 rank 4", winners.ANY}
    (case, _) = make_cases("lora_linear", Setting("cpu", torch.bfloat16, 4), None, [(16, 24, 24)])
    for winner in ("reference", "fused"):
        part = json.loads(winners.cache_file().read_text())["devices"]["cpu"]
        part["rows"] = [row | {"winner": winner} for row in part["rows"]]
        choice.store_winners(winners.cache_file(), "cpu", part)
        assert choice.choose_winner("lora_linear", OPS["lora_linear"], case.args) == winner
    winners.cache_file().write_text("{")
    assert (
        main(*TINY, "--tune", "--op", "lora_linear")[0] == 2
    )  # and what is not ours is not written over
    assert winners.cache_file().read_text() == "{"


def test_mistakes_are_told(main):
    for argv, said in (
        (("--shape", "16,24"), "expected rows,in,out"),
        (("--rank", "0"), "--rank is 0"),
        (("--graph", "--device", "cpu"), "--graph"),
        (("--shape", "1,2,3", "--model", "sd15"), "leave one out"),
        (("--candidate", "no.py:f"), "no.py:f"),
        (("--op", "lora_conv", "dora_norm", "--candidate", "no.py:f"), "name one"),
        (("--tune", "--json", "x"), "--json has no effect with --tune"),
        (("--profile", "--json", "x"), "with --profile"),
        (("--winners", "x"), "without --tune"),
        (("--quick", "--compile"), "choose one"),
    ):
        status, _, err = main("--device", "cpu", *argv)
        assert status == 2 and said in err, (argv, err)


def test_the_law_finds_one_wrong_element_and_passes_another_order_of_a_sum():
    (case,) = make_cases("dora_compose", Setting("cpu", torch.bfloat16, 4), None, [(64, 24, 24)])
    truth = laws.run_outcome(
        reference.dora_compose, reference.dora_compose, copy_arguments(case.args, torch.float64)
    )
    eager = laws.run_outcome(reference.dora_compose, reference.dora_compose, case.args)
    own = laws.errors_to_truth(eager, truth)

    def one_wrong(*args):
        out = reference.dora_compose(*args)
        return torch.cat([out.flatten()[:-1], out.flatten()[-1:] + 0.1]).view(out.shape)

    def rounded_early(y0, bias, lora, gain, strength=1.0):
        return reference.dora_compose(y0, bias, lora, gain.bfloat16().float(), strength)

    for function in (one_wrong, rounded_early):
        assert (
            laws.broken_law(
                laws.run_outcome(function, reference.dora_compose, case.args), truth, own
            )
            is not None
        )
    running = dict(truth.values) | {"gradient of gain": running_sum(case.args)}
    spare = eager.spare
    assert (
        laws.broken_law(
            laws.Outcome({key: value for key, value in running.items()}, spare), truth, own
        )
        is None
    )


def running_sum(args):
    """The gradient of gain, summed over the rows one after another in fp32."""
    y0, bias, lora, _ = (arg.detach().float() for arg in args)
    terms = laws.output_gradient(y0).float() * (y0 - bias + lora)
    total = torch.zeros(y0.shape[-1])
    for row in terms[0]:
        total = total + row
    return total


def test_the_adapted_layers_are_those_of_the_published_counts():
    assert {model: sum(row[-1] for row in parts["adapted"]) for model, parts in LAYERS.items()} == {
        "sd15": 128,
        "sdxl": 560,
        "flux": 266,
    }
    linears = {
        model: sum(row[-1] for row in parts["adapted"] + parts["linears"])
        for model, parts in LAYERS.items()
    }
    assert linears == {"sd15": 184, "sdxl": 743, "flux": 504}


def test_contenders_take_turns_and_the_ratio_is_of_the_same_round():
    order: list[str] = []
    times = timing.alternate(
        {name: lambda name=name: order.append(name) for name in "abc"}, 4, floor=0.0
    )
    assert order[-12:] == list("abcbcacababc")
    assert {len(rows) for rows in [*times.values(), *times.processor.values()]} == {4}
    made = timing.Times()
    made.update({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 2.0]})
    assert timing.median_ratio(made, "a", "b") == 1.5
    made.processor.update({"a": [1.0, 1.0, 1.0], "b": [4.0, 4.0, 4.0]})
    assert (
        timing.median_ratio(made, "a", "b") == 0.25
        and timing.median_ratio(made, "a", "b", clock=True) == 1.5
    )
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert (
        timing.text_table(["", "ms"], [["x", 1.25], ["long", None]])
        == "        ms\nx     1.25\nlong     -"
    )
