"""Sheets of images have few empty cells, whatever the number of images, prompts and seeds."""

from itertools import chain, product

import pytest

from lora_core.runs.sheet_layout import (
    MOST_COLUMNS,
    cell_width,
    choose_columns,
    empty_share,
    fill_lines,
    wrap_sizes,
)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_at_most_a_quarter_of_a_sheet_is_empty(rows: int) -> None:
    """For 0 to 5 training images, 1 to 40 prompts in 1, 2, 3 or 5 rows each, 0 to 12 new prompts;
    counted on the lines themselves.
    """
    for photos, prompts, new in product(range(6), range(1, 41), range(13)):
        groups = [(1, photos)] * (photos > 0) + [(rows, prompts)] + [(1, new)] * (new > 0)
        columns = choose_columns(groups)
        sizes = wrap_sizes(groups, columns)
        assert sum(sizes) == photos + rows * prompts + new
        lines = fill_lines(sizes, columns)
        assert list(chain.from_iterable(lines)) == list(range(len(sizes)))
        widths = [sum(sizes[i] for i in line) for line in lines]
        assert max(widths) <= columns <= MOST_COLUMNS
        empty = sum(columns - width for width in widths)
        assert empty <= columns * len(lines) / 4, (photos, prompts, new)
        assert empty_share(sizes, columns) == pytest.approx(empty / (columns * len(lines)))


def test_usual_sheets_are_as_wide_as_they_were_planned() -> None:
    assert choose_columns([(3, 4), (1, 4)]) == 4  # one caption: four seeds, four new places
    assert choose_columns([(1, 5), (3, 5), (1, 5)]) == 5  # the demo
    assert choose_columns([(1, 4)]) == 4 and choose_columns([(1, 1)]) == 1


def test_short_rows_share_a_line() -> None:
    assert fill_lines([5, 1, 1, 1, 5], 5) == [[0], [1, 2, 3], [4]]
    assert wrap_sizes([(2, 7)], 5) == [5, 5, 2, 2]


def test_sheets_are_about_1000_pixels_wide() -> None:
    assert [cell_width(columns) for columns in (1, 2, 4, 5, 8)] == [384, 384, 250, 200, 192]
