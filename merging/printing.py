"""What the commands print: tables of errors by component, files written, notes and warnings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from merging.truncation import ApproximationReport, total_report


def report_table(reports: Mapping[tuple[str, str], ApproximationReport], *, extra: str = "") -> str:
    """Layers, rank kept, energy kept and relative error, by component and in total.

    The keys are (component, path); `extra` is a last line.
    """
    groups: dict[str, list[ApproximationReport]] = {}
    for (component, _), report in reports.items():
        groups.setdefault(component, []).append(report)
    groups["total"] = list(reports.values())
    rows = [("", "layers", "rank", "of", "energy kept", "relative error")]
    for name, found in groups.items():
        whole = total_report(found)
        kept = f"{100 * max(0.0, whole.energy):.4f} %"
        ranks = str(whole.rank), str(whole.full)
        rows.append((name, str(len(found)), *ranks, kept, f"{whole.error:.2e}"))
    lines = align_columns(rows)
    if excess := total_report(reports.values()).excess:
        lines.append(
            f"randomized SVD: at most about {100 * excess:.2g} % above the smallest possible "
            "error (--svd exact for that)"
        )
    return "\n".join([*lines, *([extra] if extra else [])])


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_note(text: str) -> None:
    """One line on stderr about something that a user would not expect."""
    print(f"note: {text}", file=sys.stderr)


def print_warning(text: str) -> None:
    """One line on stderr about something that is probably wrong."""
    print(f"warning: {text}", file=sys.stderr)
