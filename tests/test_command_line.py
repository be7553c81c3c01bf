"""The scripts' command line: help without torch, and the names of the package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "diffusers", "transformers", "numpy")
RUN = """
import runpy, sys
sys.argv = [{script!r}, *{words!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("status", end.code or 0, "imported", *sorted({heavy!r} & sys.modules.keys()))
"""


def run_fresh(script: str, *words: str) -> str:
    """The last line that a script prints in a fresh process, with the libraries it imported."""
    code = RUN.format(script=script, words=words, heavy=set(HEAVY))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["infer.py", "train.py"])
def test_help_imports_no_torch(script: str) -> None:
    assert run_fresh(script, "--help") == "status 0 imported"


def test_the_package_loads_its_names_when_they_are_used() -> None:
    code = (
        "import sys, lora_core; before = 'torch' in sys.modules; lora_core.patch; "
        "print(before, 'torch' in sys.modules, set(lora_core.__all__) <= set(dir(lora_core)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    import lora_core

    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        lora_core.pach  # noqa: B018
