"""Progress over files counts bytes."""

import time

import pytest

from lora_core import progress
from merging.byte_progress import ByteBar, count_items


@pytest.fixture(autouse=True)
def always_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)


def test_a_line_shows_bytes_and_their_rate(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ByteBar(3_000_000, "writing")
    time.sleep(0.001)
    bar.add(1_500_000)
    said = capsys.readouterr().err
    assert said.startswith("writing: 1.5 MB of 3 MB, ") and ", 0 s left, " in said
    assert said.endswith("B/s\n")
    bar.add(1_500_000)
    assert bar.bar.shown is None  # closed, so that the next line begins at the margin


def test_items_are_passed_on_whatever_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    sized = [("a", 10), ("b", 0), ("c", 5)]
    assert list(count_items(sized, 15, "reading")) == ["a", "b", "c"]
    assert "reading: 15 bytes of 15 bytes" in capsys.readouterr().err


def test_nothing_is_said_of_what_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 60)
    assert list(count_items([("a", 10)], 10, "reading")) == ["a"]
    assert capsys.readouterr().err == ""
