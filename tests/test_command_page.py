"""The page of merge.py, and which words are answered without a command's work."""

import re
from collections.abc import Callable

import pytest

import merge
from merging.command_page import answer_words, make_overview
from merging.commands import COMMANDS


def test_the_page_fits_a_screen_and_names_every_command() -> None:
    page = make_overview()
    lines = page.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", page, re.M), name


@pytest.mark.parametrize(
    "words, own",
    [
        (["mix", "a", "--out", "b", "--rank=4"], True),
        (["mix", "a", "--dry-run"], True),
        (["mix", "a", "--dry_run"], True),
        (["mix", "a", "--new_rank", "4"], False),
        (["mix", "-h"], False),
        (["blend", "a"], False),
        ([], False),
    ],
)
def test_own_flags_go_straight_to_the_command(words: list[str], own: bool) -> None:
    assert merge.has_own_flags(words) is own


@pytest.mark.parametrize(
    "words, status, said",
    [
        ([], 2, "python merge.py mix"),
        (["--version"], 0, "lora_core "),
        (["mix", "a", "--new_rank", "4"], 2, "--new_rank is kohya's name"),
        (["mix", "a", "--out", "b"], None, ""),
    ],
)
def test_answers(
    words: list[str], status: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show: Callable[[str], None] = pytest.fail
    assert answer_words(words, show) == status
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
