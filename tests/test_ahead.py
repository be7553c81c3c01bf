"""Every kernel compiles for every chip without a GPU.

No spills that count, shared memory within the chip's, tensor cores where they belong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from lora_core.kernels.ahead import (
    BUILD_LISTS,
    SHARED_MEMORY,
    SPILL_ALLOWANCE,
    TENSOR_CORES,
    describe_launch,
)

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]

# A tile of 128 x 128 sums takes 512 registers of each of a warp's threads: 255 are there. The other
# has no product at all.
BAD = """
import triton
import triton.language as tl

from lora_core.kernels.ahead import Build, compile_build, find_fault


@triton.jit
def greedy_kernel(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)
    total = tl.zeros((B, B), tl.float32)
    for i in range(n):
        tile = tl.load(x + o[:, None] * B + o[None, :] + i)
        total = tl.dot(tile, tile, total)
    tl.store(y + o[:, None] * B + o[None, :], total)


@triton.jit
def copy_kernel(x, y, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(y + o, tl.load(x + o))


signature = {"x": "*bf16", "y": "*fp32", "n": "i32", "B": "constexpr"}
for kernel, warps in ((greedy_kernel, 1), (copy_kernel, 4)):
    build = Build(kernel, signature, {"B": 128}, warps, 2, True)
    print(find_fault(build, 80, compile_build(build, 80)))
spilling = compile_build(build, 80)._replace(shared=100 * 1024, kinds=("mma",))
print(find_fault(build, 89, spilling) or "fits", "/", find_fault(build, 90, spilling) or "fits")
"""

# The first configuration of each kernel, on sm_90.
FIRST = """
import json

from lora_core.kernels.ahead import build_name, compile_build, find_builds, find_fault

first = {}
for module, build in find_builds(False):
    first.setdefault(build.kernel, (module, build))
for module, build in first.values():
    found = compile_build(build, 90)
    row = {"kernel": build_name(module, build), "arch": 90, "fault": find_fault(build, 90, found)}
    print(json.dumps(row | found._asdict()))
"""


def run(arguments: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    } | more
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def compiled(folder: Path, *arguments: str) -> list[dict]:
    table = folder / "table.json"
    done = run(["-m", "lora_core.kernels.ahead", *arguments, "--json", str(table)], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(table.read_text())


def judge(rows: list[dict]) -> None:
    """Asserts what `find_fault` finds, from the figures themselves."""
    assert rows
    for row in rows:
        assert not row["fault"] and row["spills"] <= SPILL_ALLOWANCE, row
        assert row["shared"] <= SHARED_MEMORY[row["arch"]] and 0 < row["registers"] <= 255, row


def judge_modules(rows: list[dict]) -> None:
    judge(rows)
    modules = {row["kernel"].split(".")[0] for row in rows}
    assert modules == set(BUILD_LISTS)
    norms = [row for row in rows if row["kernel"].startswith("dora.norm")]
    assert norms and all(set(row["kinds"]) & set(TENSOR_CORES) for row in norms)


def test_one_configuration_of_each_kernel_fits_its_chip(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(FIRST)
    done = run([str(tmp_path / "first.py")], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    judge_modules([json.loads(line) for line in done.stdout.splitlines()])


@pytest.mark.full
def test_the_kernels_fit_their_chips(tmp_path: Path) -> None:
    # sm_89 has sm_80's instructions and less memory
    judge_modules(compiled(tmp_path, "--arch", "89", "90"))


@pytest.mark.full
def test_every_configuration_fits_its_chips(tmp_path: Path) -> None:
    judge(compiled(tmp_path, "--arch", "80", "89", "90", "100", "--full"))


def test_spills_missing_tensor_cores_and_too_much_memory_are_found(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    done = run([str(tmp_path / "bad.py")], tmp_path)
    spills, cores, memory = done.stdout.splitlines()
    assert spills.startswith("spills ") and int(spills.split()[1]) > 100
    assert cores == "has no tensor core instruction"
    needed, available = 100 * 1024, 99 * 1024
    fault = f"needs {needed} bytes of shared memory, {available} are available"
    assert memory == f"{fault} / fits"


def test_under_the_interpreter_it_says_what_to_unset(tmp_path: Path) -> None:
    done = run(
        ["-m", "lora_core.kernels.ahead", "--arch", "90", "--only", "dropout"],
        tmp_path,
        TRITON_INTERPRET="1",
    )
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr and "Traceback" not in done.stderr


def test_an_only_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    done = run(["-m", "lora_core.kernels.ahead", "--only", "nothing"], tmp_path)
    assert done.returncode != 0 and "'nothing'" in done.stderr


class Table(NamedTuple):
    pointers: tuple[Any, ...]
    numbers: tuple[int, ...]
    absent: tuple[Any, ...] = ()


def test_a_launch_is_described_as_the_launcher_specializes_it() -> None:
    """Inside tables too: pointers, 1 and None as constants, multiples of 16, and odd numbers."""
    half = torch.empty(3, dtype=torch.bfloat16, device="meta")
    arguments = {
        "table": Table((half, None), (1, 32, 7, 2**33)),
        "scale": 0.5,
        "word": 16,
        "BLOCK": 64,
    }
    params = []
    for name in arguments:
        special = {"is_constexpr": name == "BLOCK", "do_not_specialize": name == "word"}
        params.append(SimpleNamespace(**special))
    kernel = SimpleNamespace(arg_names=list(arguments), params=params)
    build = describe_launch(kernel, arguments, warps=8, name="one")
    table = Table(("*bf16", "constexpr"), ("constexpr", "i32", "i32", "i64"))
    assert build.signature == {"table": table, "scale": "fp32", "word": "i32", "BLOCK": "constexpr"}
    assert type(build.signature["table"]) is Table
    assert build.constants == {(0, 0, 1): None, (0, 1, 0): 1, (3,): 64}
    assert build.multiples == ((0, 1, 1), (0, 1, 3)) and build.warps == 8
