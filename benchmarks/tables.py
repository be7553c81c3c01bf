"""Writes the tables of benchmarks/README.md from files of benchmarks.all.

    python -m benchmarks.tables benchmarks/results/CPU.json benchmarks/results/GPU.json
                                [--write benchmarks/README.md]

No figure is copied by hand. Prints the tables as markdown; --write replaces each one in the file,
between `<!-- NAME -->` and `<!-- end -->`. A part that is not in the results is `not run`. Without
the second file the tables of a GPU are not changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import UserError, quiet_status

NOT_RUN = "not run"
Report = Mapping[str, Any]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown."""
    lines = [list(heads), ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part_results(report: Report, module: str) -> list[Mapping[str, Any]]:
    """The results of each part that ran one benchmark."""
    found = []
    for part in report["parts"].values():
        if "results" in part and part["command"].split()[2] == f"benchmarks.{module}":
            found.append(part["results"])
    return found


def origin_table(report: Report) -> str:
    """Machine, commit, date, and the command of each part with its seconds."""
    origin = f"{report['machine']}; commit {report['commit'][:8]}, {report['began'][:10]}."
    rows = []
    for part in report["parts"].values():
        rows.append([f"`{part['command']}`", f"{part['seconds']:.0f} s", part.get("error", "")])
    return origin + "\n\n" + markdown_table(["part", "took", "error"], rows)


def step_cost_table(report: Report) -> str:
    """Ops, bytes and saved activations of each model's variants, and ratios to the frozen model."""
    heads = ["", "ops", "extra ops a linear", "elementwise GB", "moved GB", "saved GB"]
    rows: list[list[str]] = []
    for found in part_results(report, "step_cost"):
        for model, one in found["models"].items():
            base = one["step"]["frozen"]
            for variant, f in one["step"].items():
                ops = f"{f['ops']:,} ({f['ops'] / base['ops']:.2f}x)"
                extra = f"{(f['ops'] - base['ops']) / one['linears']:.2f}"
                row = [f"{model} {variant}", ops, extra]
                for key in ("elementwise", "bytes", "saved"):
                    row.append(f"{f[key] / 1e9:.2f} ({f[key] / base[key]:.2f}x)")
                rows.append(row)
    return markdown_table(heads, rows) if rows else NOT_RUN


def layers_table(report: Report) -> str:
    """Geometric means of time ratios over the six layer shapes."""
    rows, others = [], ("ours / peft", "ours / compile", "ours / torch", "ours / frozen")
    for found in part_results(report, "kernels"):
        for name, row in found["summary"].items():
            if isinstance(row, Mapping) and any(key.startswith("ours / ") for key in row):
                cells = [f"{row[key]:.3f}" if key in row else "" for key in others]
                rows.append([f"{name}{', graph' if found['graph'] else ''}", *cells])
    return markdown_table(["", *others], rows) if rows else NOT_RUN


def optimizer_table(report: Report) -> str:
    """Time, launches, waits and errors of each optimizer and contender."""
    heads = ["", "ms", "to the peer", "launches", "waits", "error", "error of d"]
    rows = []
    for found in part_results(report, "optimizer"):
        for row in found["rows"]:
            network = f"{row['network']}, {row['tensors']:,} tensors"
            cells = [f"{network}, {row['optimiser']}: {row['contender']}"]
            cells += [f"{row['ms']:.3g}", f"{row['ratio']:.2f}"]
            cells += [f"{row['launches']:,}", f"{row['waits']:,}", f"{row['error']:.0e}"]
            d = row["error of d"]
            rows.append([*cells, "" if d is None else f"{d:.0e}"])
    return markdown_table(heads, rows) if rows else NOT_RUN


def train_step_table(report: Report) -> str:
    """Speed and memory of each contender's training step."""
    heads = ["", "steps/s", "ms", "over frozen", "middle half", "by the clock", "to peft"]
    rows = []
    for found in part_results(report, "train_step"):
        for one in found["results"]:
            for name, row in one["contenders"].items():
                label = f"{one['model']}, batch {one['batch']}: {name}"
                rows.append([label, *_step_cells(row)])
    return markdown_table([*heads, "peak MB"], rows) if rows else NOT_RUN


def _step_cells(row: Mapping[str, Any]) -> list[str]:
    ms = f"{1e3 * statistics.median(row['processor'] or row['clock']):.4g}"
    spread = "-".join(f"{value:.3f}" for value in row["spread"]) if "spread" in row else ""
    keys = ("ratio", "clock_ratio", "to_peer")
    ratio, clock, peer = (f"{row[key]:.3f}" if key in row else "" for key in keys)
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    return [f"{row['steps_per_second']:.3g}", ms, ratio, spread, clock, peer, memory]


def merge_table(report: Report) -> str:
    """Times and errors of compressing a sum of two adapters to their rank."""
    heads = ["layer", "ours", "dense", "peft", "dense / ours", "excess error: ours, dense, peft"]
    names = ("ours", "dense", "peft")
    rows = []
    for found in part_results(report, "merge"):
        for row in found["layers"]:
            ms = row["ms"]
            times = [f"{ms[key]:.3g} ms" for key in names]
            errors = ", ".join(f"{row['excess'][key]:.0e}" for key in names)
            label = f"{row['layer']}, rank {row['rank']}"
            rows.append([label, *times, f"{ms['dense'] / ms['ours']:.0f}x", errors])
    return markdown_table(heads, rows) if rows else NOT_RUN


# ---------------------------------------------------------------- targets

Target = tuple[str, str, str, str]  # quantity, the peer's figure, the target, ours


def targets_table(report: Report) -> str:
    """The targets with the peer's figures and ours; gpu_table has those of a GPU."""
    cost = _merge_parts(part_results(report, "step_cost"), "models")
    steps = _contenders(report)
    xl = cost.get("sdxl", {})
    summaries = [r["summary"] for r in part_results(report, "kernels") if not r["graph"]]
    ours, peers = "triton {}", "peft {}"
    elementwise, saved = (
        "elementwise bytes, SDXL, over frozen",
        "saved activations, SDXL, over frozen",
    )
    rows: list[Target] = [
        (
            "extra ops an adapted linear, SDXL: LoRA / DoRA",
            _extra(xl, peers),
            "4 / 6",
            _extra(xl, ours),
        ),
        (
            "ops of an SDXL step over frozen",
            _over(xl, peers, "ops"),
            "1.6 / 2.0",
            _over(xl, ours, "ops"),
        ),
        (
            elementwise,
            _over(xl, peers, "elementwise"),
            "1.05 / 1.3",
            _over(xl, ours, "elementwise"),
        ),
        (saved, _over(xl, peers, "saved"), "1.15 / 1.3", _over(xl, ours, "saved")),
    ]
    rows += _optimizer_targets(report)
    means = _layer_means(summaries) if report["device"] == "cpu" else []
    rows += [
        (
            "six layers, bf16, one CPU thread, ours / peft: LoRA / DoRA",
            "1 / 1",
            "0.82 / 0.55",
            _pair(means),
        ),
        (
            "DoRA norm 1280 x 1280, one CPU thread: times as fast, error",
            "1",
            "3.5, 1e-6",
            _norm_figures(report, summaries),
        ),
        (
            "SD1.5 256 px bf16 on the CPU, over frozen: LoRA / DoRA",
            _cpu(report, steps, "peft"),
            "1.05 / 1.12",
            _cpu(report, steps, "ours"),
        ),
    ]
    return markdown_table(["what", "peer", "to reach", "ours"], rows)


def _merge_parts(found: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The union of the dictionaries that the parts have under a key."""
    merged: dict[str, Any] = {}
    for one in found:
        merged |= one.get(key, {})
    return merged


def _contenders(report: Report) -> dict[tuple[str, int], Mapping[str, Any]]:
    """(model, batch) -> contender -> its row."""
    rows: dict[tuple[str, int], Mapping[str, Any]] = {}
    for found in part_results(report, "train_step"):
        for one in found["results"]:
            rows[one["model"], one["batch"]] = one["contenders"]
    return rows


def _layer_means(summaries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Ours / peft of lora_linear with LoRA and with DoRA, of the first summary that has them."""
    means = []
    for name in ("lora_linear LoRA", "lora_linear DoRA"):
        found = [summary[name]["ours / peft"] for summary in summaries if name in summary]
        means.append(found[0] if found else None)
    return means


def _pair(values: Sequence[float | None]) -> str:
    return " / ".join(f"{value:.2f}" for value in values if value is not None) or NOT_RUN


def _variants(one: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The rows of a model's LoRA and DoRA variants, of those that were measured."""
    rows = [one["step"].get(name.format(kind)) for kind in ("lora", "dora")] if one else []
    return [row for row in rows if row]


def _extra(one: Mapping[str, Any], name: str) -> str:
    rows = _variants(one, name)
    return _pair([(row["ops"] - one["step"]["frozen"]["ops"]) / one["linears"] for row in rows])


def _over(one: Mapping[str, Any], name: str, key: str) -> str:
    return _pair([row[key] / one["step"]["frozen"][key] for row in _variants(one, name)])


def _optimizer_targets(report: Report) -> list[Target]:
    """The targets on SDXL's tensors."""
    found = {}
    for one in part_results(report, "optimizer"):
        for row in one["rows"]:
            if row["network"] == "sdxl":
                found[row["optimiser"], row["contender"]] = row
    mine, adam = found.get(("prodigy", "ours")), found.get(("adamw", "ours"))
    peer = found.get(("prodigy", "prodigyopt"))
    count = "Prodigy, SDXL's tensors: launches, waits for the device"
    speed = "Prodigy / AdamW step, SDXL's tensors, times as fast as the peer"
    if not (mine and peer and adam):
        return [(count, NOT_RUN, "8, 0", NOT_RUN), (speed, "1 / 1", "3 / 1", NOT_RUN)]
    theirs, ours = (f"{row['launches']:,}, {row['waits']:,}" for row in (peer, mine))
    ratios = f"{1 / mine['ratio']:.2f} / {1 / adam['ratio']:.2f}"
    return [(count, theirs, "8, 0", ours), (speed, "1 / 1", "3 / 1", ratios)]


def _norm_figures(report: Report, summaries: Sequence[Mapping[str, Any]]) -> str:
    """Times as fast as peft and error of the DoRA norm, on a CPU."""
    name = "dora_norm 1280 x 1280"
    norm = next((summary[name] for summary in summaries if name in summary), None)
    if norm is None or report["device"] != "cpu":
        return NOT_RUN
    error = "" if norm["error"] is None else f", {norm['error']:.0e}"
    return f"{norm['times as fast as peft']:.1f}{error}"


def _cpu(report: Report, steps: Mapping[tuple[str, int], Mapping[str, Any]], side: str) -> str:
    """SD1.5's ratios to the frozen model, on a CPU."""
    rows = steps.get(("sd15", 1), {}) if report["device"] == "cpu" else {}
    names = [f"{side} {kind}" for kind in ("lora", "dora")]
    ratios = [rows[name]["ratio"] for name in names if name in rows]
    return " / ".join(f"{ratio:.3f}" for ratio in ratios) or NOT_RUN


def gpu_table(report: Report) -> str:
    """The targets and figures of a GPU; the targets were set for an H200."""
    steps = _contenders(report) if report["device"] == "cuda" else {}
    graphs = [found["summary"] for found in part_results(report, "kernels") if found["graph"]]
    means = _layer_means(graphs)
    name = report["machine"].split(" (")[0]
    batch = steps.get(("sdxl", 4), {})
    names = [f"ours {kind} graph" for kind in ("lora", "dora")]
    over = [batch[name]["ratio"] for name in names if name in batch]
    faster = "LoRA step in a graph, times as fast as eager peft"
    rows: list[Target] = [
        ("a layer in a CUDA graph, ours / peft: LoRA / DoRA", "1 / 1", "0.65 / 0.35", _pair(means)),
        (f"SD1.5 512 {faster}", "1", "6, 14 ms", _graph_speed(steps, "sd15")),
        (f"SDXL 1024 {faster}", "1", "3, 50 ms", _graph_speed(steps, "sdxl")),
        ("SDXL batch 4 in a graph over frozen: LoRA / DoRA", NOT_RUN, "1.05 / 1.08", _pair(over)),
        (f"Flux 1024 {faster}", "1", "1.35", _graph_speed(steps, "flux")),
    ]
    return markdown_table(["what", "peer", "to reach", name], rows)


def _graph_speed(steps: Mapping[tuple[str, int], Mapping[str, Any]], model: str) -> str:
    """Eager peft's time over ours in a graph, and ours."""
    rows = steps.get((model, 1), {})
    names = ("ours lora graph", "peft lora")
    if not set(names) <= set(rows):
        return NOT_RUN
    mine, peer = (statistics.median(rows[name]["clock"]) for name in names)
    return f"{peer / mine:.1f}, {1e3 * mine:.1f} ms"


TABLES = {
    "where": origin_table,
    "targets": targets_table,
    "step_cost": step_cost_table,
    "layers": layers_table,
    "optimizer": optimizer_table,
    "train_step": train_step_table,
    "merge": merge_table,
}
GPU_TABLES = {
    "gpu_where": origin_table,
    "gpu": gpu_table,
    "gpu_layers": layers_table,
    "gpu_train_step": train_step_table,
}


def fill_tables(
    text: str, report: Report, tables: Mapping[str, Callable[[Report], str]] = TABLES
) -> str:
    """The text with each table between its marks replaced.

    Raises UserError for a table without marks, which would be left out in silence.
    """
    for name, table in tables.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(mark)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise UserError(
                f"the text has no lines {mark.strip()} and {end}, between which the table belongs"
            )
        text = f"{before}{mark}{table(report)}\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="a CPU's file of benchmarks.all")
    parser.add_argument("gpu", type=Path, nargs="?", help="a GPU's")
    parser.add_argument("--write", type=Path, help="the file with the marks")
    args = parser.parse_args(argv)
    given = [(args.result, TABLES)] + ([(args.gpu, GPU_TABLES)] if args.gpu else [])
    try:
        for path, tables in given:
            report = json.loads(path.read_text())
            if args.write:
                args.write.write_text(fill_tables(args.write.read_text(), report, tables))
            else:
                print("\n\n".join(f"{name}\n\n{table(report)}" for name, table in tables.items()))
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(quiet_status(main))
