"""Which contenders of a case are measured: candidates right and wrong, and compiled references."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from lora_core.kernels import OPS, steps
from tests.conftest import TINY_LAYER

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


@pytest.mark.parametrize(
    "name, said",
    [
        ("wrong", r"the error 5.0e-02 to float64 in gradient of (down|x|up)"),
        ("frozen_up", "gives no gradient of up"),
        ("crashes", "IndexError: tile"),
    ],
)
def test_a_wrong_candidate_is_refused_with_its_error(kernels_benchmark, tmp_path, name, said):
    file = tmp_path / "mine.py"
    file.write_text(CANDIDATES)
    status, _, err = kernels_benchmark(*TINY_LAYER, "--candidate", f"{file}:{name}")
    assert status == 1
    assert "the candidate is refused: at lora_linear LoRA 16,24,24 it" in err
    assert re.search(said, err), err


def test_a_right_candidate_is_timed_next_to_the_others(kernels_benchmark, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CANDIDATES)
    status, out, err = kernels_benchmark(
        *TINY_LAYER, "--candidate", f"{file}:right", "--json", str(tmp_path / "out.json")
    )
    assert status == 0, err
    assert all(
        "candidate" in row["contenders"]
        for row in json.loads((tmp_path / "out.json").read_text())["cases"]
    )
    assert out.count("\ncandidate ") == 2


def test_more_shapes_than_dynamo_keeps_are_compiled_and_what_it_cannot_trace_is_left_out(
    kernels_benchmark, monkeypatch, tmp_path
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
    status, out, err = kernels_benchmark(
        "--compile", "--json", str(file), "--shape", *shapes, *options
    )
    assert status == 0, out + err
    stored = json.loads(file.read_text())
    compiled = ["compile" in row["contenders"] for row in stored["cases"]]
    assert compiled == [True] * len(shapes) + [False]
    assert "prodigy_step its example: torch.compile of the reference is left out, it raises" in out
