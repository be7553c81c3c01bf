"""`train.py CONFIG --plan`: the table of a run's memory, and the options that fit a card."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from lora_core import distributed
from lora_core.config import Config
from lora_core.text import hide_home
from training import starting_lora
from training.checks import config_checks
from training.memory.memory_plan import (
    ACTIVATIONS,
    GB,
    OVERHEAD,
    MemoryPlan,
    largest_size,
    plan_memory,
)
from training.memory.plan_options import Fit, find_fit

CARDS = (8, 12, 16, 24, 40, 80)  # GB of 10^9 bytes: one sold with 8 has 8.6, of which it needs some
NAME = 30  # characters of a component's name


def print_plan(config: Config, functions: Any, words: Sequence[str]) -> None:
    """Print the memory of a run by phase and component, and for each size of card the options with
    which it fits, as the command line to type. `words` are those of this command line, without
    --plan. Reads the model's configs, no weights and no images. Raises UserError in one of several
    processes: the plan of a divided run (--shard) takes their number from --processes.
    """
    distributed.check_alone(os.environ, "train.py CONFIG --plan")
    config_checks.check_config(config, needs_images=False)
    config = starting_lora.resolve_start(config)
    plan = plan_memory(config, functions)
    print("\n".join(plan_lines(plan)), flush=True)
    command = shlex.join(["python", "train.py", *words])
    print(f"\n{'card':>5}  {'needs':>7}  options that fit, the least costly first")
    for size in CARDS:
        print(_card_line(size, find_fit(config, functions, size * GB), command), flush=True)
    if (line := _present_line(config, functions)) is not None:
        print(line)


def plan_lines(plan: MemoryPlan) -> Iterator[str]:
    """The table: a line for each component that needs 10 MB somewhere, a column for each phase."""
    yield _describe_config(plan.config)
    names = [phase.name for phase in plan.phases]
    widths = [max(9, len(name) + 2) for name in names]
    yield f"\n{'GB on the device':<{NAME}}" + _row(names, widths)
    components = list(dict.fromkeys(chain.from_iterable(phase.parts for phase in plan.phases)))
    for component in components:
        sizes = [phase.parts.get(component, 0) for phase in plan.phases]
        if max(sizes) >= GB / 100 or component in (ACTIVATIONS, OVERHEAD):
            yield f"{component:<{NAME}}" + _row([_gb(size) for size in sizes], widths)
    yield "-" * (NAME + sum(widths))
    yield f"{'in all':<{NAME}}" + _row([_gb(phase.total) for phase in plan.phases], widths)
    trained = [f"{phase.name} trains {' + '.join(phase.groups)}" for phase in plan.phases[3:-2]]
    yield f"peak: {plan.peak.total / GB:.1f} GB ({plan.peak.name}); {'; '.join(trained)}"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _gb(size: int) -> str:
    return f"{size / GB:.2f}" if size >= GB / 200 else "-"


def _describe_config(config: Config) -> str:
    """Two lines: the model; adapter, images of a step, optimizer, precision, checkpointing."""
    height, width = largest_size(config)
    batch = f"{config.batch_size} image{'s' * (config.batch_size > 1)} of {width} x {height}"
    if config.accumulation > 1:
        batch += f" ({config.accumulation} times a step)"
    a = config.adapter
    parts = [
        f"plan of {hide_home(config.model)}\n{a.kind} of rank {a.rank}",
        f"{batch} pixels",
        f"{config.optimizer.name}, {config.precision}",
        f"checkpointing {config.gradient_checkpointing}",
    ]
    if config.quantize != "none":
        parts.append(config.quantize)
    if config.stream:
        parts.append("streamed")
    return ", ".join(parts)


def _card_line(size: int, found: Fit | MemoryPlan, command: str) -> str:
    if isinstance(found, Fit):
        words = shlex.join(found.words)
        line = f"{command} {words}".rstrip()
        return f"{size:>3} GB  {found.plan.peak.total / GB:4.1f} GB  {line}"
    least = f"does not fit: these options get it to {found.peak.total / GB:.1f} GB"
    return f"{size:>3} GB  {'':>7}  {least}"


def _present_line(config: Config, functions: Any) -> str | None:
    """Whether the run fits this machine's GPU; None without one, or for a run on the CPU."""
    if config.device.startswith("cpu") or not torch.cuda.is_available():
        return None
    index = torch.device(config.device if ":" in config.device else "cuda:0").index
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    plan = plan_memory(config, functions)
    needs = plan.peak.total / GB
    head = f"this machine's {name} has {free / GB:.1f} GB free of {total / GB:.1f}"
    if plan.peak.total <= free:
        return f"{head}: the run fits as it is, with {needs:.1f} GB"
    found = find_fit(config, functions, free)
    if isinstance(found, Fit):
        return f"{head}: the run needs {needs:.1f} GB; it fits with {shlex.join(found.words)}"
    return f"{head}: the run needs {needs:.1f} GB, and no options make it fit"
