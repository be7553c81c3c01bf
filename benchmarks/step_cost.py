"""Benchmark of the cost of adapters in one training step: ops, bytes moved, activations saved.

    python -m benchmarks.step_cost [--model sd15 sdxl flux sd35 flux2] [--batch 1] [--rank 16]
        [--json FILE]

Forward and backward of the denoiser, counted exactly on the meta device, without a GPU (method:
benchmarks/counting.py). SD1.5 at 512 pixels, all others at 1024, bf16, fp32 adapters on every
attention linear, no autocast, no checkpointing, attention and RMS norm as single ops, as on CUDA.
    frozen        no adapter; the gradient flows back to the input of the first adapted layer
    peft          peft's LoRA and DoRA, adapters in fp32 by its autocast_adapter_dtype
    ours          lora_core's, linears that share an input grouped; `triton` with the declared cost
                  of each kernel, `fused` with the implementations in torch
DoRA's norms are computed once in the step, as in training, and counted. Gradients are `None` before
backward, the loss is left out. The optimizer's step follows in another table: calls (a multi-tensor
call of torch, which is several launches, is one) and waits of the host for the device. Not counted:
the copy of a table of addresses that our kernels read, after gradients have moved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import prodigyopt
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import published_networks, timing
from benchmarks.counting import Counter, Tally
from lora_core import kernels
from lora_core.adapters import injection
from lora_core.adapters.injection import AdapterSpec
from lora_core.errors import UserError, quiet_status
from lora_core.memory.cuda_operators import as_cuda
from lora_core.memory.saved_tensors import saved_activations
from lora_core.optim.adamw import AdamW
from lora_core.prodigy import Prodigy

GB = 1e9
VARIANTS = (
    "frozen",
    "peft lora",
    "peft dora",
    "fused lora",
    "fused dora",
    "triton lora",
    "triton dora",
)


class StepCost(NamedTuple):
    """The cost of forward and backward of one variant of one model."""

    ops: int
    elementwise: int  # bytes of everything but matrix products, convolutions and attention
    bytes: int
    saved: int  # bytes
    operators: dict[str, int]  # ops by operator


class NetworkStep(NamedTuple):
    """A denoiser, its inputs and the paths to adapt."""

    model: nn.Module
    inputs: dict[str, Any]
    paths: tuple[str, ...]


def open_step(name: str, batch: int = 1) -> NetworkStep:
    """A published network on the meta device, with inputs and paths."""
    return NetworkStep(
        published_networks.build_network(name),
        published_networks.network_inputs(name, batch),
        published_networks.adapted_paths(name),
    )


def count_cost(step: NetworkStep, variant: str, rank: int = 16) -> StepCost:
    """The cost of one step of a variant.

    Changes the frozen model (on any device) into the variant; it cannot be used again.
    """
    model, kwargs, paths = step
    side, _, kind = variant.partition(" ")
    with ExitStack() as stack:
        stack.enter_context(as_cuda())
        if side == "frozen":
            model.get_submodule(paths[0]).register_forward_pre_hook(_require_gradient)
        elif side == "peft":
            _inject_peft(model, paths, rank, kind)
        else:
            injection.inject(model, AdapterSpec(targets=paths, kind=kind, rank=rank))
            stack.enter_context(kernels.use_kernels(side))
        counter = stack.enter_context(Counter())
        if side in ("fused", "triton"):
            stack.enter_context(injection.cache_dora_norms(model))
        with saved_activations([*model.parameters(), kwargs]) as kept:
            out = model(**kwargs)[0]
        out.backward(torch.empty_like(out))
    tally = counter.tally
    operators = {name: count.ops for name, count in tally.operators.items()}
    return StepCost(tally.ops, tally.elementwise, tally.bytes, kept.bytes, operators)


def _require_gradient(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if not args[0].requires_grad:
        args[0].requires_grad_()


def _inject_peft(model: nn.Module, paths: tuple[str, ...], rank: int, kind: str) -> None:
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(paths), use_dora=kind == "dora"
    )
    device = next(model.parameters()).device
    with torch.device(device):
        inject_adapter_in_model(config, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.to(device, torch.float32)


# ---------------------------------------------------------------- the optimizer


def count_optimizer_steps(shapes: list[tuple[int, ...]]) -> dict[str, Tally]:
    """Name -> tally of the second step over fp32 tensors of these shapes.

    The first step, not counted, makes the state.
    """
    contenders: dict[str, tuple[str, Callable[[list[nn.Parameter]], Any]]] = {
        "prodigyopt": ("meta", lambda ps: prodigyopt.Prodigy(ps, lr=1.0)),
        "ours Prodigy triton": ("meta", lambda ps: Prodigy(ps, lr=1.0)),
        "torch AdamW foreach": ("meta", lambda ps: torch.optim.AdamW(ps, foreach=True)),
        # has no meta form
        "torch AdamW fused": ("cpu", lambda ps: torch.optim.AdamW(ps, fused=True)),
        "ours AdamW triton": ("meta", lambda ps: AdamW(ps)),
    }
    found = {}
    for name, (device, make) in contenders.items():
        params = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
        found[name] = _optimizer_step(make, params)
    return found


def _optimizer_step(
    make: Callable[[list[nn.Parameter]], Any], tensors: list[nn.Parameter]
) -> Tally:
    optimizer = make(tensors)
    for _ in range(2):
        for p in tensors:
            p.grad = torch.ones_like(p)
        with Counter() as counter, kernels.use_kernels("triton"):
            optimizer.step()
    return counter.tally


# ---------------------------------------------------------------- the table


def cost_table(name: str, count: int, found: dict[str, StepCost]) -> str:
    """One model's table, with its number of adapted linears; x is the ratio to the frozen model."""
    base = found["frozen"]
    heads = f"{'':<12} {'ops':>7} {'x':>5} {'extra/linear':>13} {'elementwise GB':>15} {'x':>5}"
    heads += f" {'all GB':>7} {'x':>5} {'saved GB':>9} {'x':>5}"
    lines = [f"{name}: {count} adapted linears", heads]
    for variant, f in found.items():
        extra = (f.ops - base.ops) / count
        line = f"{variant:<12} {f.ops:7,} {f.ops / base.ops:5.2f} {extra:13.2f}"
        for size, own, width in (
            (f.elementwise, base.elementwise, 15),
            (f.bytes, base.bytes, 7),
            (f.saved, base.saved, 9),
        ):
            line += f" {size / GB:{width}.2f} {size / own:5.2f}"
        lines.append(line)
    return "\n".join(lines)


def cost_summary(name: str, found: dict[str, StepCost]) -> str:
    """One line with the cost of all adapters above the frozen model."""
    base = found["frozen"]
    parts = []
    for variant, f in found.items():
        if variant != "frozen":
            moved, saved = (f.bytes - base.bytes) / GB, (f.saved - base.saved) / GB
            ops = f"{variant} {(f.ops - base.ops):+,} ops"
            parts.append(f"{ops} {moved:+.1f} GB moved {saved:+.2f} GB saved")
    return f"cost of all adapters over the frozen {name}: " + "; ".join(parts)


def optimizer_cost_table(name: str, found: dict[str, Tally]) -> str:
    """Calls, waits and bytes of each optimizer's step."""
    lines = [f"{name}: the optimizer's step", f"{'':<20} {'calls':>7} {'syncs':>6} {'GB':>6}"]
    for title, tally in found.items():
        size = tally.bytes / GB
        lines.append(f"{title:<20} {tally.ops:7,} {tally.syncs:6,} {size:6.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        nargs="+",
        choices=published_networks.NAMES,
        default=list(published_networks.NAMES),
    )
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for all the numbers")
    args = parser.parse_args(argv)
    try:
        timing.check_positive(args, "batch", "rank")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    variants = [variant for variant in VARIANTS if variant == "frozen" or variant in args.variant]
    report: dict[str, Any] = {
        "machine": timing.describe_machine(),
        "batch": args.batch,
        "rank": args.rank,
        "models": {},
    }
    for name in args.model:
        found = {}
        for variant in variants:
            found[variant] = count_cost(open_step(name, args.batch), variant, args.rank)
        steps = count_optimizer_steps(published_networks.tensor_shapes(name, args.rank))
        count = len(published_networks.adapted_paths(name))
        print(cost_table(name, count, found))
        print(cost_summary(name, found))
        print(optimizer_cost_table(name, steps), end="\n\n")
        tallies = {}
        for title, tally in steps.items():
            tallies[title] = {"calls": tally.ops, "syncs": tally.syncs, "bytes": tally.bytes}
        report["models"][name] = {
            "linears": count,
            "step": {variant: f._asdict() for variant, f in found.items()},
            "optimizer": tallies,
        }
    if args.json:
        timing.write_json(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
