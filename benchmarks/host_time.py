"""Benchmark of the host time that adapters add to small linear layers, ours against peft's.

    python -m benchmarks.host_time [--layers 64] [--width 64] [--rows 64] [--rank 8] [--rounds 40]
                                   [--json FILE]

Layers as small as these take a few microseconds to compute, so that Python dominates: module calls,
the choice of a kernel, autograd's records. Each contender runs the forward and the backward of the
same chain of frozen linears on one thread. Printed per layer: microseconds, microseconds above the
frozen chain, the ratio of those to peft's in the same rounds, and the Python frames of the
contender's own code in one forward (frames of torch are not counted).

The contenders take turns in one process. `frozen` has no adapter; the gradient goes back to x.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import lora_core
from benchmarks import timing
from lora_core.adapters.injection import AdapterSpec, inject
from lora_core.errors import UserError, quiet_status

KINDS = ("lora", "dora")
FOLDERS = {"ours": str(Path(lora_core.__file__).parent), "peft": str(Path(peft.__file__).parent)}


def linear_chain(layers: int, width: int) -> nn.Sequential:
    """A chain of frozen linears of one width, the same in each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        chain = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    return chain.requires_grad_(False)


def build_chains(layers: int, width: int, rank: int) -> dict[str, nn.Sequential]:
    """Contender -> its chain: frozen, and each kind of adapter with ours and with peft."""
    chains = {"frozen": linear_chain(layers, width)}
    for kind in KINDS:
        ours = linear_chain(layers, width)
        theirs = linear_chain(layers, width)
        inject(ours, AdapterSpec(targets=("*",), kind=kind, rank=rank))
        names = [str(index) for index in range(layers)]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, use_dora=kind == "dora")
        inject_adapter_in_model(config, theirs)
        chains |= {f"ours {kind}": ours, f"peft {kind}": theirs}
    return chains


def training_pass(chain: nn.Module, x: Tensor) -> Callable[[], None]:
    """A function that runs forward and backward, with new gradients."""
    parameters = [p for p in chain.parameters() if p.requires_grad]

    def run() -> None:
        chain(x).sum().backward()
        x.grad = None
        for p in parameters:
            p.grad = None

    return run


def count_frames(layer: nn.Module, x: Tensor, folder: str) -> tuple[int, int]:
    """(Python frames, files) with code below `folder` in one forward after warm-up."""
    files: list[str] = []

    def record(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            files.append(frame.f_code.co_filename)

    for _ in range(2):
        layer(x)
    before = sys.getprofile()
    sys.setprofile(record)
    try:
        layer(x)
    finally:
        sys.setprofile(before)
    return len(files), len(set(files))


def measure_host_time(layers: int, width: int, rows: int, rank: int, rounds: int) -> list[dict]:
    """One row of results for each contender."""
    chains = build_chains(layers, width, rank)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    passes = {name: training_pass(chain, x) for name, chain in chains.items()}
    times = timing.alternate(passes, rounds).processor
    found = []
    for name, chain in chains.items():
        side, _, kind = name.partition(" ")
        above = [a - b for a, b in zip(times[name], times["frozen"], strict=True)]
        row = {
            "contender": name,
            "us": 1e6 * statistics.median(times[name]) / layers,
            "us above": None,
            "ratio": None,
            "frames": None,
            "files": None,
        }
        if kind:
            rounds_of_peft = zip(times[f"peft {kind}"], times["frozen"], strict=True)
            peft_above = [a - b for a, b in rounds_of_peft]
            ratios = [a / b for a, b in zip(above, peft_above, strict=True)]
            row["us above"] = 1e6 * statistics.median(above) / layers
            row["ratio"] = statistics.median(ratios)
            row["frames"], row["files"] = count_frames(chain[0], x, FOLDERS[side])
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=64, help="of the chain; default 64")
    parser.add_argument("--width", type=int, default=64, help="in and out of each; default 64")
    parser.add_argument("--rows", type=int, default=64, help="of the input; default 64")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters; default 8")
    parser.add_argument(
        "--rounds", type=int, default=40, help="of which the median is taken; default 40"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args(argv)
    try:
        timing.check_positive(given, "layers", "width", "rows", "rank", "rounds")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    settings = {name: getattr(given, name) for name in ("layers", "width", "rows", "rank")}
    print(timing.describe_machine())
    rows = measure_host_time(**settings, rounds=given.rounds)
    heads = ["contender", "us", "us above", "ratio", "frames", "files"]
    print(timing.text_table(heads, [[row[head] for head in heads] for row in rows]))
    print("a layer, forward + backward; ratio: of the time above frozen, to peft's")
    if given.json:
        machine = timing.describe_machine()
        timing.write_json(given.json, {"machine": machine, **settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
