"""What a command leaves behind: the file, its recipe in the header, and the table on the screen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core import formats
from lora_core.adapters.weight_updates import AdapterState, LowRank
from lora_core.errors import UserError
from lora_core.formats import EMBEDDINGS
from lora_core.formats.factor_lists import write_factor_lists
from lora_core.formats.layout import Layout
from merging.adapter_sums import LayerKey
from merging.compare import frobenius_norm
from merging.factor_sums import concat_factors
from merging.svd import ApproximationReport, total_report

RECIPE = "lora_core.merge"  # header entry: JSON, the command with its options and the sha256 of its inputs
SIDECAR = "lora_core_merge.json"  # the same as a file in a model's folder
FORMATS_WITH_TOKENS = ("cloneofsimo",)  # formats that hold tokens beside factors


@dataclass(frozen=True)
class Output:
    """Where a result goes."""

    path: str
    overwrite: bool = False
    dry_run: bool = False
    dtype: torch.dtype | None = None
    format: str = ""  # of an adapter; empty: the first input's
    recipe: Mapping[str, Any] = field(default_factory=dict)  # for the header

    @property
    def header(self) -> dict[str, str]:
        return (
            {RECIPE: json.dumps(self.recipe, sort_keys=True, ensure_ascii=False)}
            if self.recipe
            else {}
        )


def check_output(output: Output, *, folder: bool = False) -> None:
    """Raises UserError, before any work, for an output that exists (without --overwrite), is of the other kind, or cannot be written."""
    path = Path(output.path)
    if path.is_dir() and not folder:
        raise UserError(f"the output {path} is a folder; name a file in it")
    if path.exists() and not output.overwrite and not output.dry_run:
        raise UserError(
            f"{path} is there already; pass --overwrite to replace it, or name another output"
        )
    if path.is_file() and folder:
        raise UserError(
            f"the output {path} is a file; name a folder, or one that ends in .safetensors or .ckpt for a single file"
        )
    parent = next(place for place in path.absolute().parents if place.exists())
    if not parent.is_dir():
        raise UserError(
            f"the output {path} lies below {parent}, which is no folder; choose another place"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"the output {path} cannot be written, {parent} is not writable; choose another place"
        )


def token_file_path(path: str | Path) -> Path:
    """Where an adapter's token rows go when its format has no place for them."""
    path = Path(path)
    return path.with_name(path.stem + EMBEDDINGS)


def check_adapter_output(output: Output, *, tokens: bool = False) -> None:
    """`check` of an adapter's file, and of its tokens' where it has some; of all three of cloneofsimo's .pt files."""
    if not output.path:
        raise UserError("no output; name a file")
    path = Path(output.path)
    check_output(output)
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(
            f"the output {path} should end in .safetensors, or in .pt for cloneofsimo's lists"
        )
    if path.suffix == ".pt":
        for end in (".text_encoder.pt", ".ti.pt"):
            check_output(replace(output, path=str(path.with_suffix(end))))
    elif tokens and output.format not in FORMATS_WITH_TOKENS:
        check_output(replace(output, path=str(token_file_path(path))))


def write_adapter(state: AdapterState, output: Output, layout: Layout | None) -> list[Path]:
    """The files written: the factors, and beside them the token rows where the format has no place for them. None on a dry run.

    Without factors the file itself holds the rows. Raises UserError as `formats.save` does.
    """
    path = Path(output.path)
    factors = any(state.components.values())
    if output.dry_run:
        return []
    if path.suffix == ".pt":
        return write_factor_lists(state, path, layout)
    written = []
    if factors:
        inside = output.format in FORMATS_WITH_TOKENS
        own = (
            state
            if inside
            else AdapterState(state.components, {}, state.token_names, state.metadata)
        )
        formats.save(
            own,
            path,
            format=output.format,
            layout=layout,
            metadata=output.header,
            dtype=output.dtype,
        )
        written.append(path)
        if inside:
            return written
    if state.tokens:
        rows = token_file_path(path) if factors else path
        formats.save(state, rows, format="embeddings", layout=layout, metadata=output.header)
        written.append(rows)
    if not written:
        raise UserError(f"nothing is left to write to {path}: no layer and no token")
    return written


def round_adapter(
    adapter: LowRank, report: ApproximationReport, dtype: torch.dtype | None
) -> tuple[LowRank, ApproximationReport]:
    """The factors in the dtype of the file, and the report with what that loses."""
    if dtype is None or (adapter.down.dtype == dtype and adapter.up.dtype == dtype):
        return adapter, report
    cast = adapter._replace(down=adapter.down.to(dtype), up=adapter.up.to(dtype))
    if not (torch.isfinite(cast.down).all() and torch.isfinite(cast.up).all()):
        raise UserError(f"the factors overflow {dtype}; choose --dtype bf16 or fp32")
    if adapter.magnitude is not None:
        return cast, report
    lost = frobenius_norm(concat_factors([(1.0, adapter), (-1.0, cast)]))
    return cast, report._replace(lost=(report.lost**2 + lost**2) ** 0.5)


# ---------------------------------------------------------------- on the screen


def report_table(reports: Mapping[LayerKey, ApproximationReport], *, extra: str = "") -> str:
    """By component and in total: layers, rank kept, energy kept, relative error."""
    components: dict[str, list[ApproximationReport]] = {}
    for (component, _), report in reports.items():
        components.setdefault(component, []).append(report)
    rows = [("", "layers", "rank", "of", "energy kept", "relative error")]
    for name, found in [*components.items(), ("total", list(reports.values()))]:
        whole = total_report(found)
        rows.append(
            (
                name,
                str(len(found)),
                str(whole.rank),
                str(whole.full),
                f"{100 * max(0.0, whole.energy):.4f} %",
                f"{whole.error:.2e}",
            )
        )
    excess = total_report(reports.values()).excess
    lines = align_columns(rows)
    if excess:
        lines.append(
            f"randomised SVD: at most about {100 * excess:.2g} % above the smallest possible error (--svd exact for that)"
        )
    return "\n".join([*lines, *([extra] if extra else [])])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def print_written(paths: Iterable[str | Path], output: Output) -> None:
    """Which files there are now, or that it was a dry run."""
    if output.dry_run:
        print(f"dry run: {output.path} was not written")
    for path in paths:
        print(f"written: {path}")


def print_note(text: str) -> None:
    """One line on stderr about something that a user would not expect."""
    print(f"note: {text}", file=sys.stderr)


def print_warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
