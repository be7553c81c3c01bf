"""A run's folder as a page shows it: options, stages, metrics, validation, summary, model card.

A run may be unfinished, resumed, of an older version, or damaged in places: its intact
files are read, and `notes` has a sentence for each missing one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.diffusion.validation import SCORE_FIELDS, Score
from lora_core.errors import UserError
from lora_core.json_files import INTEGER, Fields, read_object, read_rows
from lora_core.runs.run_folder import is_run
from lora_core.runs.shared_options import share_options
from lora_core.text import hide_home, read_text
from lora_core.toml import LONGEST_TOML, flatten_table, from_table, parse_toml, to_table

Column = tuple[list[int], list[float]]  # steps, values
STEP_FIELDS: Fields = {"step": INTEGER}
NO_DEFAULT = "not set"
UNKNOWN = "no option of this version"
# Options that say where a run is, not what it is.
PLACES = ("out", "overwrite", "resume", "resume_anyway")
PAGE = "report.html"


class StageSpan(NamedTuple):
    """A stage of a run."""

    first: int  # steps done before it
    last: int  # steps done after it
    groups: str  # "denoiser + tokens"


class ChangedOption(NamedTuple):
    """An option of a run that differs from its default."""

    name: str  # with dots: optimizer.name, stages.1.schedule
    value: str
    default: str


@dataclass(frozen=True)
class RunRecord:
    """All that a page says about a run, without its images."""

    folder: Path
    name: str
    settings: tuple[ChangedOption, ...] = ()  # those that differ from the defaults
    options: Mapping[str, Any] = field(default_factory=dict)  # of config.toml, as shared
    stages: tuple[StageSpan, ...] = ()
    metrics: Mapping[str, Column] = field(default_factory=dict)
    scores: Mapping[int, list[Score]] = field(default_factory=dict)  # steps done -> validation
    summary: Mapping[str, Any] = field(default_factory=dict)  # empty for an unfinished run
    card: str = ""  # the text of README.md
    notes: tuple[str, ...] = ()  # sentences about what is missing or damaged

    @property
    def steps_done(self) -> int:
        """Steps that are in the files."""
        logged = [steps[-1] for steps, _ in self.metrics.values()]
        return max([*logged, *self.scores, 0])

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].last if self.stages else self.steps_done

    @property
    def is_finished(self) -> bool:
        return bool(self.summary)

    @property
    def scored(self) -> str:
        """The validation loss in words, such as "held-out loss"."""
        words = self.summary.get("scored")
        return words if isinstance(words, str) else "validation loss"

    @property
    def shows_data(self) -> bool:
        """Whether the run shows training images and their captions (--samples.show-data)."""
        return option_section(self.options, "samples").get("show_data") is True


def read_run(folder: Path) -> RunRecord:
    """The record of the run in a folder. Raises UserError where there is no run."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the folder of a run")
    if not is_run(folder):
        raise UserError(
            f"{folder} holds no run: it has neither config.toml nor metrics.jsonl; "
            "name a folder that train.py wrote"
        )
    notes: list[str] = []
    options = _read_options(folder, notes)
    rows = _read_until_damage(folder / "metrics.jsonl", STEP_FIELDS, notes)
    scores: dict[int, list[Score]] = defaultdict(list)
    for row in _read_until_damage(folder / "val.jsonl", SCORE_FIELDS, notes):
        scores[row["step"]].append(Score(*(row[name] for name in Score._fields)))
    summary = _read_summary(folder, notes)
    if not rows:
        notes.append("There are no metrics yet: the run has not logged a step.")
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        settings=tuple(changed_settings(options)),
        options=options,
        stages=tuple(read_stages(options)),
        metrics=metric_columns(rows),
        scores=dict(sorted(scores.items())),
        summary=summary,
        card=_read_card(folder),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- options


def changed_settings(options: Mapping[str, Any]) -> list[ChangedOption]:
    """The options of a config's table that differ from this version's defaults."""
    found = []
    defaults = _default_options()
    for name, value in flatten_table(options).items():
        first, _, rest = name.partition(".")
        # the second stage has the defaults of a stage too
        usual = f"stages.0.{rest.partition('.')[2]}" if first == "stages" else name
        if name in PLACES or (usual in defaults and value == defaults[usual]):
            continue
        if usual in defaults:
            default = format_option(defaults[usual])
        else:
            default = NO_DEFAULT if _is_known(usual, value) else UNKNOWN
        found.append(ChangedOption(name, format_option(value), default))
    return found


@cache
def _default_options() -> dict[str, Any]:
    return flatten_table(to_table(from_table({})))


def format_option(value: Any) -> str:
    """The value of an option as people write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(format_option, value)) or "none"
    return str(value) if value != "" else "empty"


def _is_known(name: str, value: Any) -> bool:
    """Whether this version has an option of that dotted name."""
    for part in reversed(name.split(".")):
        value = [value] if part.isdigit() else {part: value}
    try:
        from_table(value)
    except UserError as error:
        return not str(error).startswith("unknown key")
    return True


def option_section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a config's table; empty where it is no table."""
    section = options.get(name)
    return section if isinstance(section, dict) else {}


def read_stages(options: Mapping[str, Any]) -> list[StageSpan]:
    """The stages of a config's table, with their first and last steps."""
    spans: list[StageSpan] = []
    done = 0
    stages = options.get("stages", [])
    for stage in stages if isinstance(stages, list) else []:
        steps = stage.get("steps") if isinstance(stage, dict) else None
        if not isinstance(steps, int):
            return []
        groups = " + ".join(map(str, stage.get("groups", [])))
        spans.append(StageSpan(done, done + steps, groups))
        done += steps
    return spans


# ---------------------------------------------------------------- metrics


def metric_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """Metric -> (steps, values), those that are finite numbers."""
    columns: dict[str, Column] = defaultdict(lambda: ([], []))
    for row in rows:
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name != "step" and is_number and math.isfinite(value):
                columns[name][0].append(row["step"])
                columns[name][1].append(float(value))
    return columns


# ---------------------------------------------------------------- files


def read_config_table(folder: Path) -> dict[str, Any]:
    """The options in a run's config.toml, as people share them. Raises UserError and OSError."""
    file = folder / "config.toml"
    return share_options(parse_toml(read_text(file, LONGEST_TOML), str(file)), folder)


def _read_options(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_config_table(folder)
    except FileNotFoundError:
        notes.append("There is no config.toml, so settings and stages are not known.")
    except (UserError, OSError) as error:
        notes.append(f"Its settings cannot be read: {hide_home(str(error))}.")
    return {}


def _read_until_damage(file: Path, fields: Fields, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines up to the first that cannot be read."""
    rows: list[dict[str, Any]] = []
    if not file.is_file():
        return rows
    try:
        for row in read_rows(file, "what is before it is shown", fields):
            rows.append(row)
    except UserError as error:
        notes.append(f"{hide_home(str(error))}.")
    return rows


def _read_summary(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The object of summary.json; empty where there is none."""
    if not (folder / "summary.json").is_file():
        return {}
    try:
        return read_object(folder / "summary.json", "a run writes it at its end")
    except UserError as error:
        notes.append(f"{hide_home(str(error))}.")
        return {}


def _read_card(folder: Path) -> str:
    try:
        return read_text(folder / "README.md")
    except (UserError, OSError):  # a page without the lines that load the files says so
        return ""
