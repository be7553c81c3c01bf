"""The Dockerfile, the Colab notebook, the citation and the type markers."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from lora_core.config import Config
from lora_core.flags.command_line import parse_command_line
from training.run_presets import PRESETS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
NOTEBOOK = json.loads((ROOT / "examples" / "colab.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def check_targets(text: str) -> None:
    """Every `make TARGET` of the text is a target of the Makefile."""
    targets = re.findall(r"\bmake (\w[\w-]*)", text)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


def test_the_container_runs_the_two_commands_on_a_python_that_is_accepted() -> None:
    assert 'CMD ["make", "demo"]' in DOCKERFILE and "lora_core make test" in DOCKERFILE
    check_targets(DOCKERFILE.replace("install --no-install-recommends", ""))
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-", DOCKERFILE, re.M)
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))


def test_the_container_has_what_the_set_up_calls() -> None:
    """make, git (.ci clones), and the compiler of the optimizer's loops and of Triton."""
    (packages,) = re.findall(r"apt-get install (.*?)\\?\n *&&", DOCKERFILE, re.S)
    assert {"make", "gcc", "git", "libc6-dev"} <= set(packages.split())
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "runs", ".git"} <= set(ignored)
    assert not {"toy", "configs", "tests", "Makefile"} & set(ignored)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint, a linter of Dockerfiles")
def test_the_linter_of_dockerfiles_has_no_complaint() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_notebook_has_the_form_of_one() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == (
            [],
            None,
        )


def test_the_notebook_is_python_and_runs_the_two_commands() -> None:
    for cell in CELLS:
        lines = cell.replace("\\\n", " ").splitlines()
        python = [line for line in lines if not line.startswith(("!", "%"))]
        ast.parse("\n".join(python))
    text = "\n".join(CELLS)
    check_targets(text)
    assert "!make demo" in text and "!make test" in text


def test_the_notebook_trains_with_options_that_exist() -> None:
    text = "\n".join(CELLS).replace("\\\n", " ")  # continued lines in one
    (command,) = re.findall(r"^!\.venv/bin/python train\.py (.*)$", text, re.M)
    words = shlex.split(command)
    assert words[:2] == ["--preset", "$PRESET"]
    config = parse_command_line(Config, words[2:], prog="train.py", example="")
    assert (config.data.images, config.out) == ("photos", "runs/mine")
    (choices,) = re.findall(r"PRESET = .*@param (\[.*\])", "\n".join(CELLS))
    assert tuple(json.loads(choices)) == PRESETS


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    for key, name in (("title", "name"), ("version", "version"), ("license", "license")):
        assert citation[key] == project[name]
    urls = {reference["url"] for reference in citation["references"]}
    assert urls == set(project["urls"].values())
    for reference in citation["references"]:
        year = int(re.findall(r"arxiv\.org/abs/(\d\d)", reference["url"])[0])
        assert reference["year"] == 2000 + year and reference["authors"]


def test_type_checkers_of_others_read_our_annotations() -> None:
    """PEP 561: a file py.typed in each package, among what is installed."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("lora_core", "merging", "models", "training"):
        assert (ROOT / package / "py.typed").is_file() and "py.typed" in data[package]
