"""One picture of what adapters add to the frozen model, ours beside peft: launches, elementwise bytes, saved activations, time of a step.

    python -m benchmarks.plot benchmarks/results/MACHINE.json [--out docs/benchmarks.png]

A bar begins at 1, the frozen model, and ends at the cost with adapters: what is seen is what they add. Counts are of benchmarks.step_cost with the
kernels, times of benchmarks.train_step; what the file has no figure for is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.runs.pictures import INK
from lora_core.runs.run_folder import atomic_write

TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux", "toy": "toy"}
KINDS = {"lora": "LoRA", "dora": "DoRA"}
COLOURS = {"ours": "#1f6f8b", "peft": "#c9ccd1"}
COUNTS = {
    "ops": "operations launched",
    "elementwise": "elementwise bytes",
    "saved": "saved activations",
}
TIMES = {"cpu": "time of a step, CPU", "cuda": "time of a step, GPU"}
PANEL, ROW, EDGE = (
    2.9,
    0.46,
    1.15,
)  # inches: a panel's width, a row's height, above and below the rows
GAP = 0.35  # rows between two models

CostRatios = dict[str, float]  # "ours" or "peft" -> times the frozen model


def gather_panels(report: Mapping[str, Any]) -> dict[str, dict[str, CostRatios]]:
    """Panel -> row -> times the frozen model, from a file of benchmarks.all."""
    panels: dict[str, dict[str, CostRatios]] = {title: {} for title in COUNTS.values()}
    found = [part["results"] for part in report["parts"].values() if "results" in part]
    for results in found:
        for model, row in (
            results.get("models", {}).items() if isinstance(results.get("models"), Mapping) else ()
        ):
            if "step" in row:
                _counts(panels, model, row["step"])
    for results in found:
        for one in results.get("results", ()) if isinstance(results.get("results"), list) else ():
            if "contenders" in one and one["model"] != "toy":
                _times(panels.setdefault(TIMES[report["device"]], {}), one)
    return {title: rows for title, rows in panels.items() if rows}


def _counts(
    panels: dict[str, dict[str, CostRatios]], model: str, step: Mapping[str, Mapping[str, float]]
) -> None:
    for key, title in COUNTS.items():
        for kind, name in KINDS.items():
            chosen = {"ours": f"triton {kind}", "peft": f"peft {kind}"}
            row = {
                side: step[variant][key] / step["frozen"][key]
                for side, variant in chosen.items()
                if variant in step
            }
            if row:
                panels[title][f"{TITLES[model]} {name}"] = row


def _times(panel: dict[str, CostRatios], one: Mapping[str, Any]) -> None:
    batch = f", batch {one['batch']}" if one["batch"] > 1 else ""
    for kind, name in KINDS.items():
        ratios = {
            side: one["contenders"].get(f"{side} {kind}", {}).get("ratio") for side in COLOURS
        }
        row = {side: ratio for side, ratio in ratios.items() if ratio}
        if row:
            panel[f"{TITLES[one['model']]} {name}{batch}"] = row


def draw_panels(panels: Mapping[str, Mapping[str, CostRatios]], out: Path, note: str) -> None:
    """The picture as PNG, whole or not at all."""
    import matplotlib.pyplot as plt  # one second of import

    plt.switch_backend("Agg")
    places = _places(list(dict.fromkeys(name for rows in panels.values() for name in rows)))
    height = EDGE + ROW * (max(places.values()) + 1)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.2 + PANEL * len(panels), height),
        sharey=True,
        layout="constrained",
    )
    try:
        for axis, (title, rows) in zip(
            axes if len(panels) > 1 else [axes], panels.items(), strict=True
        ):
            _panel(axis, title, rows, places)
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
        figure.legend(handles, list(COLOURS), loc="outside upper right", ncols=2, frameon=False)
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
    """Where each row stands: 0, 1, ... and a gap before another model."""
    places, at = {}, 0.0
    for before, name in zip(["", *names], names):
        at += 0 if not before else 1 + GAP * (before.split()[0] != name.split()[0])
        places[name] = at
    return places


def _panel(
    axis: Any, title: str, rows: Mapping[str, CostRatios], places: Mapping[str, float]
) -> None:
    most = max(value for row in rows.values() for value in row.values())
    room = max(most - 1, 0.1)
    for name, i in places.items():
        for side, shift in (("ours", -0.19), ("peft", 0.19)):
            value = rows.get(name, {}).get(side)
            if value is None:
                continue
            axis.barh(i + shift, value - 1, left=1, height=0.34, color=COLOURS[side])
            weight = "bold" if side == "ours" else "normal"
            axis.text(
                max(value, 1) + 0.03 * room,
                i + shift,
                f"{value:.2f}",
                va="center",
                fontsize=8,
                color=INK,
                weight=weight,
            )
        if name not in rows:
            axis.text(
                1 + 0.03 * room,
                i,
                "not run",
                va="center",
                fontsize=8,
                color="#9aa1a9",
                style="italic",
            )
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_xlim(
        min(1.0, *(value for row in rows.values() for value in row.values())) - 0.02 * room,
        1 + 1.24 * room,
    )
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
    """1, and whole steps from it."""
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(1 if room > 2 else 0.5 if room > 0.8 else 0.1 if room > 0.15 else 0.05)


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
        help="the picture; default docs/benchmarks.png",
    )
    args = parser.parse_args(argv)
    try:
        report = json.loads(args.result.read_text())
        panels = gather_panels(report)
        if not panels:
            raise UserError(
                f"{args.result} has neither counts nor times of steps; make it with python -m benchmarks.all"
            )
    except (UserError, OSError, json.JSONDecodeError, KeyError) as error:
        print(
            f"error: {args.result} cannot be drawn: {error!r}"
            if not isinstance(error, UserError)
            else f"error: {error}",
            file=sys.stderr,
        )
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_panels(panels, args.out, figure_caption(report, panels))
    print(f"plot: {args.out}")
    return 0


def figure_caption(report: Mapping[str, Any], panels: Mapping[str, Any]) -> str:
    """How and where the figures were made."""
    times = "Times: not run."
    if TIMES[report["device"]] in panels:
        at = ", SD1.5 at 256 px, bf16" if report["device"] == "cpu" else ""
        times = f"Times: paired medians, {report['machine'].split(',')[0]}{at}."
    counts = (
        "Counted on the meta device at batch 1 (SD1.5 at 512 px, SDXL and Flux at 1024). "
        if set(COUNTS.values()) & set(panels)
        else ""
    )
    return f"{counts}{times} Commit {report['commit'][:8] or 'unknown'}, {report['began'][:10]}."


if __name__ == "__main__":
    sys.exit(main())
