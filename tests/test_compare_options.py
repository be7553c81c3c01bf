"""Options of a comparison: which command lines ask for one, and their help without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.comparisons.compare_options import asks_for_comparison

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (["--compare", "a", "b"], True),
        (["--metric", "x0", "--compare=a", "--against", "b"], True),
        (["--against", "b"], True),
        (["configs/toy_pti.toml", "--loss", "compare"], False),
        ([], False),
    ],
)
def test_a_command_line_that_names_a_side_asks_for_a_comparison(
    words: list[str], asks: bool
) -> None:
    assert asks_for_comparison(words) == asks


def test_the_options_need_no_torch() -> None:
    probe = "import sys, training.comparisons.compare_options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT).returncode == 0
