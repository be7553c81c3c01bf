"""Benchmark of the optimizer's step on the adapters of SD1.5 (256 tensors) and SDXL (1,120).

    python -m benchmarks.optimizer [--networks sd15 sdxl] [--rank 16] [--rounds 9] [--threads 1]
                                   [--device cpu|cuda] [--json FILE]

Our Prodigy and AdamW next to prodigyopt and torch's AdamW. Prints, for each, the time of a step
(contenders take turns in one process), its ratio to the peer's, the launches and waits for the
device of a step on a GPU, and the distance of d and of the parameters to the peer's own float64 run
after five steps. Launches are torch calls without views (one that takes many tensors is several on
a GPU) and the declared ones of our kernels, counted on the meta device as described in
benchmarks/counting.py; a wait is a value that travels to the host (.item()).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from prodigyopt import Prodigy as Prodigyopt
from torch import Tensor

from benchmarks import timing
from benchmarks.counting import Counter, Tally
from benchmarks.published_networks import tensor_shapes
from lora_core import kernels
from lora_core.errors import UserError, quiet_status
from lora_core.optim.adamw import AdamW
from lora_core.prodigy import Prodigy

STEPS = 5  # steps that are compared with float64
Make = Callable[[list[Tensor]], torch.optim.Optimizer]
CONTENDERS: dict[str, dict[str, Make]] = {  # optimizer -> contender; the second one is the peer
    "prodigy": {"ours": Prodigy, "prodigyopt": Prodigyopt},
    "adamw": {
        "ours": AdamW,
        "torch, fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    },
}


def make_parameters(
    shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Parameters with an adapter's initial values: down random, up zero."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, shape in enumerate(shapes):
        p = torch.zeros(shape)
        if i % 2 == 0:
            p = torch.randn(shape, generator=generator) / shape[-1]
        found.append(p.to(device, dtype).requires_grad_())
    return found


def _join(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params])


def set_gradients(params: list[Tensor], step: int) -> None:
    """Set the gradients to those of a noisy parabola, the same for every dtype.

    Prodigy's d grows on it from the second step on.
    """
    generator, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + step)
    for p in params:
        goal = 0.01 * torch.randn(p.shape, generator=generator)
        p.grad = p.detach() - goal.to(p) + 1e-3 * torch.randn(p.shape, generator=noise).to(p)


def make_quietly(make: Make, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer, without the line that prodigyopt prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make(params)


def count_step(make: Make, shapes: Sequence[tuple[int, ...]], contender: str) -> Tally:
    """The counts of the second step, on the meta device.

    On the CPU for torch's fused kernel, which refuses the meta device and issues the same calls.
    """
    params = make_parameters(shapes, "cpu" if contender == "torch, fused" else "meta")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make_quietly(make, params)
    with kernels.use_kernels("triton" if contender == "ours" else kernels.current_mode()):
        with Counter():
            optimizer.step()
        with Counter() as counted:
            optimizer.step()
    return counted.tally


def run_trajectory(
    make: Make, shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype
) -> tuple[Tensor, float | None]:
    """(all parameters end to end, d or None) after STEPS steps."""
    params = make_parameters(shapes, device, dtype)
    optimizer = make_quietly(make, params)
    for step in range(STEPS):
        set_gradients(params, step)
        optimizer.step()
    d = optimizer.param_groups[0].get("d")
    return _join(params), None if d is None else float(d)


def measure_optimizer(
    network: str, name: str, rank: int, rounds: int, device: str
) -> list[dict[str, Any]]:
    """One row of results for each contender."""
    shapes, contenders = tensor_shapes(network, rank), CONTENDERS[name]
    peer = list(contenders)[1]
    exact, exact_d = run_trajectory(contenders[peer], shapes, device, torch.float64)
    moved = (exact - _join(make_parameters(shapes, device, torch.float64))).norm()
    rows, steps = [], {}
    for contender, make in contenders.items():
        found, d = run_trajectory(make, shapes, device, torch.float32)
        counted = count_step(make, shapes, contender)
        error_of_d = None
        if d is not None and exact_d is not None:
            error_of_d = abs(d / exact_d - 1)
        rows.append(
            {
                "network": network,
                "tensors": len(shapes),
                "parameters": exact.numel(),
                "optimiser": name,  # the spelling of the stored results
                "contender": contender,
                "launches": counted.ops,
                "waits": counted.syncs,
                "error": ((found.double() - exact).norm() / moved).item(),
                "error of d": error_of_d,
            }
        )
        params = make_parameters(shapes, device)
        set_gradients(params, 0)
        optimizer = make_quietly(make, params)
        if name == "prodigy":  # the same gradient at every step would let d grow without end
            for group in optimizer.param_groups:
                group["d_coef"] = 1e-12
        steps[contender] = optimizer.step
    times = timing.alternate(steps, rounds, device=device)
    for row in rows:
        row |= {
            "ms": 1e3 * timing.median_seconds(times, row["contender"]),
            "ratio": timing.median_ratio(times, row["contender"], peer),
            "peer": peer,
        }
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--networks", nargs="+", default=["sd15", "sdxl"], choices=["sd15", "sdxl", "flux"]
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; default 16")
    parser.add_argument(
        "--rounds", type=int, default=9, help="of which the median is taken; default 9"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default 1")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    given = parser.parse_args(argv)
    try:
        timing.check_positive(given, "rank", "rounds", "threads")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    print(timing.describe_machine(given.device))
    rows = []
    for network in given.networks:
        for name in CONTENDERS:
            rows += measure_optimizer(network, name, given.rank, given.rounds, given.device)
    heads = ["network", "tensors", "optimiser", "contender", "ms", "ratio", "launches", "waits"]
    heads += ["error", "error of d"]
    print(timing.text_table(heads, [[row[head] for head in heads] for row in rows]))
    print(
        "ratio: to the peer, which has 1, in the same rounds; launches and waits: of a step on a "
        f"GPU; errors: to float64 after {STEPS} steps"
    )
    if given.json:
        results = {
            "machine": timing.describe_machine(given.device),
            "threads": given.threads,
            "rank": given.rank,
            "rows": rows,
        }
        timing.write_json(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
