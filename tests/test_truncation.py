"""How much of an update is kept: what means nothing is refused, reports add up in squares."""

from __future__ import annotations

import pytest

from merging.truncation import ApproximationReport, Keep, total_report


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rank": 4, "energy": 0.9},
        {"rank": 0},
        {"max_error": 1.5},
        {"max_error": -0.1},
        {"energy": -0.2},
        {"energy": 1.1},
    ],
)
def test_keep_refuses_what_means_nothing(wrong):
    with pytest.raises(ValueError):
        Keep(**wrong)


def test_reports_of_layers_add_up_in_squares():
    both = total_report(
        [ApproximationReport(2, 4, 3.0, 0.3, 1e-4), ApproximationReport(1, 4, 4.0, 0.4)]
    )
    assert (
        both == ApproximationReport(3, 8, 5.0, pytest.approx(0.5), 1e-4)
        and both.error == pytest.approx(0.1)
        and both.energy == pytest.approx(0.99)
    )
    assert total_report([]) == ApproximationReport(0, 0, 0.0, 0.0)
