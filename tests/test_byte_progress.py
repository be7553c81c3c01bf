"""Progress bars count bytes, and are left out where nobody looks."""

import pytest

from merging import byte_progress
from merging.byte_progress import ByteBar, count_items


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(byte_progress, "hides_progress", lambda: False)


def test_a_bar_shows_bytes_and_their_rate(terminal, capsys):
    bar = ByteBar(3_000_000, "writing")
    bar.bar.mininterval = 0
    bar.add(1_500_000)
    assert "1.50M/3.00M" in (said := capsys.readouterr().err) and "B/s" in said
    bar.add(1_500_000)
    assert bar.bar.disable  # closed, so that the next line begins at the margin


def test_items_are_passed_on_whatever_is_shown(terminal, capsys):
    sized = [("a", 10), ("b", 0), ("c", 5)]
    assert list(count_items(sized, 15, "reading")) == ["a", "b", "c"]
    assert "reading" in capsys.readouterr().err


def test_no_bar_without_a_terminal(capsys):
    assert list(count_items([("a", 10)], 10, "reading")) == ["a"]
    assert capsys.readouterr().err == ""
