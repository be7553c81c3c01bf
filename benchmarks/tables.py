"""The tables of benchmarks/README.md from a file of benchmarks.all, so that no figure is copied by hand.

    python -m benchmarks.tables benchmarks/results/CPU.json benchmarks/results/GPU.json [--write benchmarks/README.md]

Prints them as markdown; --write puts each between its marks, `<!-- NAME -->` and `<!-- end -->`. A part that the file does not have is `not run`.
Without the second file the tables of a GPU are left as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.errors import UserError

NOT_RUN = "not run"
Report = Mapping[str, Any]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part_results(report: Report, module: str) -> list[Mapping[str, Any]]:
    """What the parts of one benchmark left."""
    parts = report["parts"].values()
    return [
        part["results"]
        for part in parts
        if "results" in part and part["command"].split()[2] == f"benchmarks.{module}"
    ]


def origin_table(report: Report) -> str:
    """Machine, commit, day, and the command of each part with the seconds that it took."""
    rows = [
        [f"`{part['command']}`", f"{part['seconds']:.0f} s", part.get("error", "")]
        for part in report["parts"].values()
    ]
    return (
        f"{report['machine']}; commit {report['commit'][:8]}, {report['began'][:10]}.\n\n"
        + markdown_table(["part", "took", "error"], rows)
    )


def step_cost_table(report: Report) -> str:
    heads = ["", "ops", "extra ops a linear", "elementwise GB", "moved GB", "saved GB"]
    rows: list[list[str]] = []
    for found in part_results(report, "step_cost"):
        for model, one in found["models"].items():
            base = one["step"]["frozen"]
            for variant, f in one["step"].items():
                cells = [
                    f"{f[key] / 1e9:.2f} ({f[key] / base[key]:.2f}x)"
                    for key in ("elementwise", "bytes", "saved")
                ]
                extra = f"{(f['ops'] - base['ops']) / one['linears']:.2f}"
                rows.append(
                    [
                        f"{model} {variant}",
                        f"{f['ops']:,} ({f['ops'] / base['ops']:.2f}x)",
                        extra,
                        *cells,
                    ]
                )
    return markdown_table(heads, rows) if rows else NOT_RUN


def layers_table(report: Report) -> str:
    """Geometric means over the six shapes."""
    rows, others = [], ("ours / peft", "ours / compile", "ours / torch", "ours / frozen")
    for found in part_results(report, "kernels"):
        for name, row in found["summary"].items():
            if isinstance(row, Mapping) and any(key.startswith("ours / ") for key in row):
                cells = [f"{row[key]:.3f}" if key in row else "" for key in others]
                rows.append([f"{name}{', graph' if found['graph'] else ''}", *cells])
    return markdown_table(["", *others], rows) if rows else NOT_RUN


def optimizer_table(report: Report) -> str:
    heads = ["", "ms", "to the peer", "launches", "waits", "error", "error of d"]
    rows = []
    for found in part_results(report, "optimizer"):
        for row in found["rows"]:
            d = "" if row["error of d"] is None else f"{row['error of d']:.0e}"
            name = f"{row['network']}, {row['tensors']:,} tensors, {row['optimiser']}: {row['contender']}"
            rows.append(
                [
                    name,
                    f"{row['ms']:.3g}",
                    f"{row['ratio']:.2f}",
                    f"{row['launches']:,}",
                    f"{row['waits']:,}",
                    f"{row['error']:.0e}",
                    d,
                ]
            )
    return markdown_table(heads, rows) if rows else NOT_RUN


def train_step_table(report: Report) -> str:
    heads = [
        "",
        "steps/s",
        "ms",
        "over frozen",
        "middle half",
        "by the clock",
        "to peft",
        "peak MB",
    ]
    rows = []
    for found in part_results(report, "train_step"):
        for one in found["results"]:
            for name, row in one["contenders"].items():
                spread = (
                    "-".join(f"{value:.3f}" for value in row["spread"]) if "spread" in row else ""
                )
                ratios = [
                    f"{row[key]:.3f}" if key in row else ""
                    for key in ("ratio", "clock_ratio", "to_peer")
                ]
                memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
                ms = f"{1e3 * statistics.median(row['processor'] or row['clock']):.4g}"
                label = f"{one['model']}, batch {one['batch']}: {name}"
                rows.append(
                    [
                        label,
                        f"{row['steps_per_second']:.3g}",
                        ms,
                        ratios[0],
                        spread,
                        *ratios[1:],
                        memory,
                    ]
                )
    return markdown_table(heads, rows) if rows else NOT_RUN


def merge_table(report: Report) -> str:
    rows = []
    for found in part_results(report, "merge"):
        for row in found["layers"]:
            ms, errors = (
                row["ms"],
                ", ".join(f"{row['excess'][key]:.0e}" for key in ("ours", "dense", "peft")),
            )
            times = [f"{ms[key]:.3g} ms" for key in ("ours", "dense", "peft")]
            rows.append(
                [
                    f"{row['layer']}, rank {row['rank']}",
                    *times,
                    f"{ms['dense'] / ms['ours']:.0f}x",
                    errors,
                ]
            )
    return (
        markdown_table(
            ["layer", "ours", "dense", "peft", "dense / ours", "excess error: ours, dense, peft"],
            rows,
        )
        if rows
        else NOT_RUN
    )


# ---------------------------------------------------------------- the figures to reach (issue 5)


def targets_table(report: Report) -> str:
    """Each figure with the peer's and ours, from whichever part has it; `gpu` has those of a GPU."""
    cost, steps = _first(part_results(report, "step_cost"), "models"), _contenders(report)
    xl, kernels = (
        cost.get("sdxl", {}),
        [r["summary"] for r in part_results(report, "kernels") if not r["graph"]],
    )
    ours, peers = (f"{side} {{}}" for side in ("triton", "peft"))
    rows: list[tuple[str, str, str, str]] = [
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
            "elementwise bytes, SDXL, over frozen",
            _over(xl, peers, "elementwise"),
            "1.05 / 1.3",
            _over(xl, ours, "elementwise"),
        ),
        (
            "saved activations, SDXL, over frozen",
            _over(xl, peers, "saved"),
            "1.15 / 1.3",
            _over(xl, ours, "saved"),
        ),
    ]
    rows += _optimizers(report)
    means = [
        next(
            (
                k[f"lora_linear {kind}"]["ours / peft"]
                for k in kernels
                if f"lora_linear {kind}" in k
            ),
            None,
        )
        for kind in ("LoRA", "DoRA")
    ]
    norm = next((k["dora_norm 1280 x 1280"] for k in kernels if "dora_norm 1280 x 1280" in k), None)
    norm_error = "" if norm is None or norm["error"] is None else f", {norm['error']:.0e}"
    rows += [
        (
            "six layers, bf16, one CPU thread, ours / peft: LoRA / DoRA",
            "1 / 1",
            "0.82 / 0.55",
            _pair(means if report["device"] == "cpu" else []),
        ),
        (
            "DoRA norm 1280 x 1280, one CPU thread: times as fast, error",
            "1",
            "3.5, 1e-6",
            _times_as_fast(report, norm, norm_error),
        ),
        (
            "SD1.5 256 px bf16 on the CPU, over frozen: LoRA / DoRA",
            _cpu(report, steps, "peft"),
            "1.05 / 1.12",
            _cpu(report, steps, "ours"),
        ),
    ]
    return markdown_table(["what", "peer", "to reach", "ours"], rows)


def _first(found: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    merged: dict[str, Any] = {}
    for one in found:
        merged |= one.get(key, {})
    return merged


def _contenders(report: Report) -> dict[tuple[str, int], Mapping[str, Any]]:
    """(model, batch) -> contender -> its row."""
    return {
        (one["model"], one["batch"]): one["contenders"]
        for found in part_results(report, "train_step")
        for one in found["results"]
    }


def _pair(values: Sequence[float | None]) -> str:
    return " / ".join(f"{value:.2f}" for value in values if value is not None) or NOT_RUN


def _extra(one: Mapping[str, Any], name: str) -> str:
    rows = [one["step"].get(name.format(kind)) for kind in ("lora", "dora")] if one else []
    return _pair(
        [(row["ops"] - one["step"]["frozen"]["ops"]) / one["linears"] for row in rows if row]
    )


def _over(one: Mapping[str, Any], name: str, key: str) -> str:
    rows = [one["step"].get(name.format(kind)) for kind in ("lora", "dora")] if one else []
    return _pair([row[key] / one["step"]["frozen"][key] for row in rows if row])


def _optimizers(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows of SDXL's tensors."""
    found = {
        (row["optimiser"], row["contender"]): row
        for one in part_results(report, "optimizer")
        for row in one["rows"]
        if row["network"] == "sdxl"
    }
    mine, peer, adam = (
        found.get(key)
        for key in (("prodigy", "ours"), ("prodigy", "prodigyopt"), ("adamw", "ours"))
    )
    count, speed = (
        "Prodigy, SDXL's tensors: launches, waits for the device",
        "Prodigy / AdamW step, SDXL's tensors, times as fast as the peer",
    )
    if not (mine and peer and adam):
        return [(count, NOT_RUN, "8, 0", NOT_RUN), (speed, "1 / 1", "3 / 1", NOT_RUN)]
    counts = [f"{row['launches']:,}, {row['waits']:,}" for row in (peer, mine)]
    return [
        (count, counts[0], "8, 0", counts[1]),
        (speed, "1 / 1", "3 / 1", f"{1 / mine['ratio']:.2f} / {1 / adam['ratio']:.2f}"),
    ]


def _times_as_fast(report: Report, norm: Mapping[str, float] | None, error: str) -> str:
    return (
        NOT_RUN
        if norm is None or report["device"] != "cpu"
        else f"{norm['times as fast as peft']:.1f}{error}"
    )


def _cpu(report: Report, steps: Mapping[tuple[str, int], Mapping[str, Any]], side: str) -> str:
    rows = steps.get(("sd15", 1), {}) if report["device"] == "cpu" else {}
    ratios = [
        rows[f"{side} {kind}"]["ratio"] for kind in ("lora", "dora") if f"{side} {kind}" in rows
    ]
    return " / ".join(f"{ratio:.3f}" for ratio in ratios) or NOT_RUN


def gpu_table(report: Report) -> str:
    """The figures of a GPU; what is to be reached was set for an H200."""
    steps = _contenders(report) if report["device"] == "cuda" else {}
    graphs = [found["summary"] for found in part_results(report, "kernels") if found["graph"]]
    kinds = [f"lora_linear {kind}" for kind in ("LoRA", "DoRA")]
    means = [next((g[kind]["ours / peft"] for g in graphs if kind in g), None) for kind in kinds]
    name = report["machine"].split(" (")[0]

    def faster(model: str) -> str:
        rows = steps.get((model, 1), {})
        if not {"peft lora", "ours lora graph"} <= set(rows):
            return NOT_RUN
        mine, peer = (
            statistics.median(rows[name]["clock"]) for name in ("ours lora graph", "peft lora")
        )
        return f"{peer / mine:.1f}, {1e3 * mine:.1f} ms"

    batch = steps.get(("sdxl", 4), {})
    names = [f"ours {kind} graph" for kind in ("lora", "dora")]
    over = [batch[name]["ratio"] for name in names if name in batch]
    rows = [
        ("a layer in a CUDA graph, ours / peft: LoRA / DoRA", "1 / 1", "0.65 / 0.35", _pair(means)),
        (
            "SD1.5 512 LoRA step in a graph, times as fast as eager peft",
            "1",
            "6, 14 ms",
            faster("sd15"),
        ),
        (
            "SDXL 1024 LoRA step in a graph, times as fast as eager peft",
            "1",
            "3, 50 ms",
            faster("sdxl"),
        ),
        ("SDXL batch 4 in a graph over frozen: LoRA / DoRA", NOT_RUN, "1.05 / 1.08", _pair(over)),
        (
            "Flux 1024 LoRA step in a graph, times as fast as eager peft",
            "1",
            "1.35",
            faster("flux"),
        ),
    ]
    return markdown_table(["what", "peer", "to reach", name], rows)


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
    """The text with each table between its marks. Raises UserError for a table without marks: it would be left out in silence."""
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
    sys.exit(main())
