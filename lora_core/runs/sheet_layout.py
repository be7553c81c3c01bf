"""Where the rows of a sheet of images go, so that little of it stays empty."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_COLUMNS = 6
MOST_EMPTY = 0.25  # share of the cells of a sheet
USUAL_COLUMNS = 5
# Against a share of empty cells: ln(lines / columns) of a tall sheet, and a column more or less
TALL_WEIGHT, COLUMN_WEIGHT = 0.1, 0.02


def fill_lines(sizes: Sequence[int], columns: int) -> list[list[int]]:
    """The numbers of the rows on each line of a sheet, for rows with `sizes` images in order.

    A row goes beside the one before it where it fits in `columns`.
    """
    lines: list[list[int]] = []
    used = columns
    for number, size in enumerate(sizes):
        if used + size > columns:
            lines.append([])
            used = 0
        lines[-1].append(number)
        used += size
    return lines


def empty_share(sizes: Sequence[int], columns: int) -> float:
    """The share of the cells of a sheet that hold no image, in [0, 1]."""
    cells = columns * len(fill_lines(sizes, columns))
    return 1 - sum(sizes) / cells


def wrap_sizes(groups: Sequence[tuple[int, int]], columns: int) -> list[int]:
    """The sizes of rows of at most `columns` images, for groups of (rows, images of each row).

    The first parts of all rows of a group come first, then their second parts, and so on.
    """
    sizes: list[int] = []
    for rows, images in groups:
        for first in range(0, images, columns):
            sizes += [min(columns, images - first)] * rows
    return sizes


def choose_columns(groups: Sequence[tuple[int, int]]) -> int:
    """The number of columns, 1 to MOST_COLUMNS, of a sheet with groups of (rows, images of each
    row): of those that leave at most MOST_EMPTY of the cells empty, one with few empty cells, not
    taller than wide, and near to USUAL_COLUMNS.
    """
    scores = {}
    for columns in range(1, MOST_COLUMNS + 1):
        sizes = wrap_sizes(groups, columns)
        if columns > sum(sizes):
            break
        share = empty_share(sizes, columns)
        if share <= MOST_EMPTY:
            lines = len(fill_lines(sizes, columns))
            tall = max(0.0, math.log(lines / columns))
            unusual = abs(columns - USUAL_COLUMNS)
            scores[columns] = share + TALL_WEIGHT * tall + COLUMN_WEIGHT * unusual
    return min(scores, key=lambda columns: scores[columns])


def cell_width(columns: int) -> int:
    """Pixels of an image's width: about 1000 for a line of a sheet, 192 to 384 for an image."""
    return max(192, min(384, 1000 // columns))
