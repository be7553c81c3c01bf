"""The benchmark of kernels as a program on tiny layers: its rows, ratios and JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lora_core.kernels import OPS
from tests.conftest import TINY_LAYER

ROOT = Path(__file__).parent.parent


def test_the_command_prints_ratios_to_peft_and_stores_them(tmp_path):
    """As its users start it."""
    file = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels",
        "--quick",
        *TINY_LAYER[:-2],
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


def test_every_op_has_a_row_with_errors_and_all_it_was_asked_for(kernels_benchmark, tmp_path):
    file = tmp_path / "all.json"
    status, out, _ = kernels_benchmark(*TINY_LAYER, "--json", str(file))
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


def test_mistakes_are_told(kernels_benchmark):
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
        status, _, err = kernels_benchmark("--device", "cpu", *argv)
        assert status == 2 and said in err, (argv, err)
