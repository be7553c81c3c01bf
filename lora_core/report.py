"""One page about a run, or about several side by side: settings, images, losses, tokens, files.

    python -m lora_core.report runs/mine                   # writes runs/mine/report.html
    python -m lora_core.report runs/a runs/b --out ab.html # compares them

The page is one file that opens from the disk: its charts are SVG, its images are inside, and it
loads nothing. It is safe to publish: no folders of images, and training images and captions
of files only with --samples.show-data.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from lora_core.atomic_files import atomic_write
from lora_core.byte_sizes import format_bytes
from lora_core.errors import UserError, exit_status, printable
from lora_core.progress import format_duration
from lora_core.runs import report_charts
from lora_core.runs.comparison import Comparison
from lora_core.runs.report_charts import change_color
from lora_core.runs.report_comparison import compare_groups, group_records, style_runs
from lora_core.runs.report_data import PAGE, RunRecord, read_run
from lora_core.runs.report_images import MOST_BYTES, read_images
from lora_core.runs.report_metrics import (
    bin_changes,
    change_table,
    common_scores,
    training_figures,
    validation_figures,
    validation_of_runs,
)
from lora_core.runs.report_sections import (
    RunPart,
    common_settings,
    data_parts,
    describe_run_part,
    differing_settings,
    last_samples,
)

MOST_NAMES = 4  # of groups in a title
TEMPLATE = Path(__file__).parent / "runs" / "report_template.html"
MADE_HERE = b'data-made-by="lora_core.report"'  # at the beginning of every page
SECTIONS = (
    ("images", "Training images"),
    ("samples", "Samples"),
    ("validation", "Validation"),
    ("training", "Training"),
    ("tokens", "Tokens"),
    ("settings", "Settings"),
    ("files", "Files"),
)
FIRST_OF_MANY = ("runs", "comparison", "settings")  # of a page about several runs


def write_report(
    runs: Sequence[Path], out: Path | None = None, *, measured: Sequence[Comparison] = ()
) -> Path:
    """Write a page about the runs in these folders and return its path: `out`, else RUN/report.html
    of one run, else report.html in the folder that holds the first one.

    Groups of runs are compared by their validation loss; `measured` are comparisons by other
    measures, whose results the page shows, too. Raises UserError for a folder without a run, and
    for an `out` that is another file than a page.
    """
    folders = list(dict.fromkeys(Path(os.path.abspath(run)) for run in runs))
    if not folders:
        raise UserError("there is no run to report on; name the folder of one or more runs")
    if out is None:
        out = (folders[0] if len(folders) == 1 else folders[0].parent) / PAGE
    _check_replaceable(out)
    records = [read_run(folder) for folder in folders]
    page = _read_template().render(_page_context(records, measured))
    with atomic_write(out) as temporary:
        temporary.write_text(printable(page), encoding="utf-8")
    return out


def _check_replaceable(out: Path) -> None:
    """Raises UserError for a file that is no page of ours."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file of the page, such as {PAGE}")
    if out.is_file() and MADE_HERE not in out.open("rb").read(200):
        raise UserError(
            f"--out {out} is a file that is no page of lora_core.report; name another file"
        )


@cache
def _read_template() -> Template:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- content of the page


def _page_context(
    records: Sequence[RunRecord], measured: Sequence[Comparison] = ()
) -> dict[str, Any]:
    """The variables of the template."""
    many = len(records) > 1
    groups, group_notes = group_records(records) if many else ({"": [records[0].folder]}, [])
    styles = style_runs(records, groups)
    comparison = compare_groups(records, groups, measured) if many else None
    parts = []
    for record, style in zip(records, styles, strict=True):
        images = read_images(
            record.folder,
            shows_data=record.shows_data,
            card=record.card,
            last_only=many,
            most_bytes=MOST_BYTES // len(records),
        )
        parts.append((describe_run_part(record, images, style), last_samples(images)))
    runs = [part for part, _ in parts]
    return {
        "many": many,
        "title": _title(records, groups),
        "lead": _lead(runs),
        "tiles": [] if many else _tiles(runs[0]),
        "sections": _list_sections(many=many, compares=comparison is not None),
        "runs": runs,
        "comparison": comparison,
        "group_notes": group_notes,
        "settings": {
            "common": common_settings(records),
            "rows": differing_settings(records) if many else [],
        },
        "data": data_parts(runs),
        **_samples_by_prompt(parts),
        "validation": _validation_of(records, styles),
        "training": _training_of(records, styles),
        "command": shlex.join(record.name for record in records),
        "chart_top": report_charts.TOP,
        "chart_bottom": report_charts.HEIGHT - report_charts.BOTTOM,
    }


def _list_sections(*, many: bool, compares: bool) -> list[tuple[str, str]]:
    """(anchor, title) of the sections, in their order on the page."""
    if not many:
        return list(SECTIONS)
    first = [
        (name, name.capitalize()) for name in FIRST_OF_MANY if compares or name != "comparison"
    ]
    return [*first, *(own for own in SECTIONS if own[0] not in FIRST_OF_MANY)]


def _title(records: Sequence[RunRecord], groups: Mapping[str, Sequence[Path]]) -> str:
    """The name of the run, or those of the groups of runs with their number."""
    if len(records) == 1:
        return records[0].name
    names = list(groups)
    return (
        f"{', '.join(names[:MOST_NAMES])}{' ...' * (len(names) > MOST_NAMES)}: {len(records)} runs"
    )


def _lead(runs: Sequence[RunPart]) -> str:
    """The page in a sentence."""
    if len(runs) > 1:
        return "Runs side by side: settings in which they differ, losses, curves and samples."
    (run,) = runs
    record = run.record
    stages = [f"{span.last - span.first:,} steps of {span.groups}" for span in record.stages]
    model = str(record.options.get("model") or "an unknown model")
    words = f"{', then '.join(stages) or 'Training'} on {model}"
    if not record.is_finished:
        whole = f" of {record.steps:,}" if record.stages else ""
        words += f"; not finished, {record.steps_done:,}{whole} steps are done"
    changes = record.summary.get("changes")
    if isinstance(changes, list) and changes:
        words += f"; resumed with changes: {'; '.join(map(str, changes))}"
    return f"{words}."


def _tiles(run: RunPart) -> list[tuple[str, str]]:
    """The numbers at the head of the page of one run."""
    tiles = [("steps", run.steps)]
    if run.before != "none":
        scored = run.record.scored
        tiles += [(f"{scored} before", run.before), ("after", run.after), ("change", run.change)]
    seconds = run.record.summary.get("seconds")
    if isinstance(seconds, int | float):
        tiles.append(("time", format_duration(seconds)))
    peak = run.record.summary.get("peak_memory")
    if isinstance(peak, dict) and isinstance(peak.get("bytes"), int) and peak["bytes"] > 0:
        tiles.append(("peak memory", format_bytes(peak["bytes"])))
    return [*tiles, ("seed", str(run.record.options.get("seed", "unknown")))]


def _samples_by_prompt(parts: Sequence[tuple[RunPart, tuple[str, list[Any]]]]) -> dict[str, Any]:
    """The last samples of several runs: prompt -> (run, image, what differs from the others)."""
    steps = {words for _, (words, images) in parts if images}
    prompts: dict[str, list[Any]] = {}
    for run, (words, images) in parts:
        for image in images:
            own = f", {words}" if len(steps) > 1 else ""
            prompts.setdefault(image.caption, []).append((run, image, own))
    drawn = f" ({steps.pop()})" if len(steps) == 1 else ""
    words = f"The last sheet of each run{drawn}, with the same seed for a prompt."
    return {"prompts": list(prompts.items()), "sample_words": words}


def _validation_of(records: Sequence[RunRecord], styles: Sequence[Any]) -> dict[str, Any]:
    """The section about validation."""
    notes = []
    for record, style in zip(records, styles):
        start = f"{style.name}: " if len(records) > 1 else ""
        found, remark = common_scores(record)
        if not found and record.is_finished:
            notes.append(f"{start}There is no val.jsonl: the run was trained without validation.")
        elif not found:
            notes.append(f"{start}There is no validation yet.")
        elif len(found) == 1:
            notes.append(f"{start}There is one validation, so that no change can be shown.")
        if remark:
            notes.append(start + remark)
    if len(records) > 1:
        return {"notes": notes, "figures": validation_of_runs(records, styles), "heat": None,
                "table": []}  # fmt: skip
    record, scores = records[0], common_scores(records[0])[0]
    heat = None
    if len(scores) > 2:
        table = change_table(scores)
        rows = []
        for name, values in table.rows:
            cells = [(_percent(v), change_color(v, table.most)) for v in values]
            rows.append((name, cells))
        heat = {"steps": table.steps, "rows": rows}
    return {
        "notes": notes,
        "figures": validation_figures(record),
        "heat": heat,
        "table": bin_changes(scores) if len(scores) > 1 else [],
    }


def _percent(change: float) -> str:
    """A relative change in percent, without a sign where it rounds to zero."""
    text = f"{100 * change:+.1f}"
    return "0.0" if float(text) == 0 else text


def _training_of(records: Sequence[RunRecord], styles: Sequence[Any]) -> dict[str, Any]:
    """The section about training."""
    notes = []
    if len(records) > 1 and len({record.stages for record in records}) > 1:
        notes.append("The runs have different stages, so that their beginnings are not marked.")
    figures = training_figures(records, styles)
    if not figures:
        notes.append("No step has been logged yet.")
    return {"notes": notes, "figures": figures}


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 for a UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_core.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; default: RUN/report.html")
    given = parser.parse_args(argv)
    return exit_status(functools.partial(_print_report, given.runs, given.out))


def _print_report(runs: Sequence[Path], out: Path | None) -> None:
    print(f"page: {write_report(runs, out)}")


if __name__ == "__main__":
    sys.exit(main())
