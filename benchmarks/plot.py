"""Bar chart of the cost of adapters relative to the frozen model, ours and peft's.

    python -m benchmarks.plot benchmarks/results/MACHINE.json [--out docs/benchmarks.png]

The panels are launches, elementwise bytes, saved activations and the time of a step. A bar begins
at 1, the frozen model, and ends at the cost with adapters, so that its length is their share.
Counts are from benchmarks.step_cost with the kernels, times from benchmarks.train_step; panels
without figures in the file are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.atomic_files import atomic_write
from lora_core.errors import UserError, quiet_status
from lora_core.runs.pictures import INK

TITLES = {
    "sd15": "SD1.5",
    "sdxl": "SDXL",
    "flux": "Flux",
    "sd35": "SD3.5",
    "flux2": "FLUX.2",
    "toy": "toy",
}
KINDS = {"lora": "LoRA", "dora": "DoRA"}
COLORS = {"ours": "#1f6f8b", "peft": "#c9ccd1"}
COUNTS = {
    "ops": "operations launched",
    "elementwise": "elementwise bytes",
    "saved": "saved activations",
}
TIMES = {"cpu": "time of a step, CPU", "cuda": "time of a step, GPU"}
# Inches: width of a panel, height of a row, margins above and below the rows.
PANEL, ROW, EDGE = 2.9, 0.46, 1.15
GAP = 0.35  # rows between two models

CostRatios = dict[str, float]  # "ours" or "peft" -> times the frozen model


def gather_panels(report: Mapping[str, Any]) -> dict[str, dict[str, CostRatios]]:
    """Panel -> row -> ratios to the frozen model, from a file of benchmarks.all."""
    panels: dict[str, dict[str, CostRatios]] = {title: {} for title in COUNTS.values()}
    parts = [part["results"] for part in report["parts"].values() if "results" in part]
    for part in parts:
        models = part.get("models")
        if isinstance(models, Mapping):
            for model, row in models.items():
                if "step" in row:
                    _add_counts(panels, model, row["step"])
    for part in parts:
        results = part.get("results")
        if isinstance(results, list):
            for one in results:
                if "contenders" in one and one["model"] != "toy":
                    _add_times(panels.setdefault(TIMES[report["device"]], {}), one)
    return {title: rows for title, rows in panels.items() if rows}


def _add_counts(
    panels: dict[str, dict[str, CostRatios]], model: str, step: Mapping[str, Mapping[str, float]]
) -> None:
    for key, title in COUNTS.items():
        for kind, name in KINDS.items():
            row = {}
            for side, variant in (("ours", f"triton {kind}"), ("peft", f"peft {kind}")):
                if variant in step:
                    row[side] = step[variant][key] / step["frozen"][key]
            if row:
                panels[title][f"{TITLES[model]} {name}"] = row


def _add_times(panel: dict[str, CostRatios], one: Mapping[str, Any]) -> None:
    batch = f", batch {one['batch']}" if one["batch"] > 1 else ""
    for kind, name in KINDS.items():
        row = {}
        for side in COLORS:
            ratio = one["contenders"].get(f"{side} {kind}", {}).get("ratio")
            if ratio:
                row[side] = ratio
        if row:
            panel[f"{TITLES[one['model']]} {name}{batch}"] = row


def draw_panels(panels: Mapping[str, Mapping[str, CostRatios]], out: Path, note: str) -> None:
    """Write the chart as PNG, atomically."""
    import matplotlib.pyplot as plt  # one second of import

    plt.switch_backend("Agg")
    places = _places(list(dict.fromkeys(itertools.chain(*panels.values()))))
    height = EDGE + ROW * (max(places.values()) + 1)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.2 + PANEL * len(panels), height),
        sharey=True,
        layout="constrained",
    )
    try:
        all_axes = axes if len(panels) > 1 else [axes]
        for axis, (title, rows) in zip(all_axes, panels.items(), strict=True):
            _draw_panel(axis, title, rows, places)
        handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
        figure.legend(handles, list(COLORS), loc="outside upper right", ncols=2, frameon=False)
        figure.suptitle(
            "What adapters of rank 16 add to a training step, times the frozen model",
            x=0.01,
            ha="left",
            fontsize=12,
            color=INK,
        )
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color="#6a737d")
        with atomic_write(out) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    finally:
        plt.close(figure)


def _places(names: Sequence[str]) -> dict[str, float]:
    """The vertical position of each row: 0, 1, ... with a gap between models."""
    places, at = {}, 0.0
    for before, name in zip(["", *names], names):
        at += 0 if not before else 1 + GAP * (before.split()[0] != name.split()[0])
        places[name] = at
    return places


def _draw_panel(
    axis: Any, title: str, rows: Mapping[str, CostRatios], places: Mapping[str, float]
) -> None:
    values = list(itertools.chain(*(row.values() for row in rows.values())))
    room = max(max(values) - 1, 0.1)
    label = {"va": "center", "fontsize": 8}
    for name, i in places.items():
        for side, shift in (("ours", -0.19), ("peft", 0.19)):
            value = rows.get(name, {}).get(side)
            if value is None:
                continue
            axis.barh(i + shift, value - 1, left=1, height=0.34, color=COLORS[side])
            weight = "bold" if side == "ours" else "normal"
            x = max(value, 1) + 0.03 * room
            axis.text(x, i + shift, f"{value:.2f}", color=INK, weight=weight, **label)
        if name not in rows:
            axis.text(1 + 0.03 * room, i, "not run", color="#9aa1a9", style="italic", **label)
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_xlim(min(1.0, *values) - 0.02 * room, 1 + 1.24 * room)
    axis.set_ylim(max(places.values()) + 0.55, -0.55)
    axis.set_yticks(list(places.values()), list(places), fontsize=9.5)
    axis.set_title(title, fontsize=10, loc="left", color=INK)
    axis.xaxis.set_major_locator(_ticks(room))
    axis.tick_params(axis="x", labelsize=8, length=0, colors="#6a737d")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)


def _ticks(room: float) -> Any:
    """Axis ticks at 1 and at equal steps from it."""
    from matplotlib.ticker import MultipleLocator

    for least, step in ((2, 1.0), (0.8, 0.5), (0.15, 0.1)):
        if room > least:
            return MultipleLocator(step)
    return MultipleLocator(0.05)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a file of benchmarks.all")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("docs/benchmarks.png"),
        help="the image; default docs/benchmarks.png",
    )
    args = parser.parse_args(argv)
    try:
        report = json.loads(args.result.read_text())
        panels = gather_panels(report)
        if not panels:
            raise UserError(
                f"{args.result} has neither counts nor times of steps; "
                "make it with python -m benchmarks.all"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, json.JSONDecodeError, KeyError) as error:
        print(f"error: {args.result} cannot be drawn: {error!r}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_panels(panels, args.out, figure_caption(report, panels))
    print(f"plot: {args.out}")
    return 0


def figure_caption(report: Mapping[str, Any], panels: Mapping[str, Any]) -> str:
    """A sentence on how, where and when the figures were measured."""
    times = "Times: not run."
    if TIMES[report["device"]] in panels:
        at = ", SD1.5 at 256 px, bf16" if report["device"] == "cpu" else ""
        times = f"Times: paired medians, {report['machine'].split(',')[0]}{at}."
    counts = ""
    if set(COUNTS.values()) & set(panels):
        counts = "Counted on the meta device at batch 1 (SD1.5 at 512 px, SDXL and Flux at 1024). "
    return f"{counts}{times} Commit {report['commit'][:8] or 'unknown'}, {report['began'][:10]}."


if __name__ == "__main__":
    sys.exit(quiet_status(main))
