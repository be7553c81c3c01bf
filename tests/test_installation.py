"""Installation: declared dependencies, a plain install, and the refusal of wheels."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = ("lora_core", "merging", "models", "toy", "training")
OPTIONAL = {
    "datasets",
    "pillow-heif",
    "tensorboard",
    "torchao",
    "wandb",
}  # extras, imported where they are asked for
UNPINNED = {"gradio", "wandb"}  # not among the tests' packages; gradio asks for pillow below 13
BROUGHT = {"pyarrow": "datasets"}  # package -> the extra of ours that requires it

# Trains two steps, draws, merges and folds, in the environment that it is started in.
SESSION = """
import sys
import infer, merge, train
out, photos = sys.argv[1:]
model = ["--model", "toy/model", "--device", "cpu"]
short = ["--stages.0.steps", "2", "--batch-size", "1", "--samples.steps", "1"]
short += ["--validation.every", "-1"]
data = ["--data.images", photos, "--data.resolution", "64"]
assert train.main([*model, *short, *data, "--out", out + "/run"]) == 0
image = ["--lora", out + "/run", "--prompt", "a TOK", "--steps", "1", "--out", out + "/image.png"]
assert infer.main([*model, *image]) == 0
lora = out + "/run/pytorch_lora_weights.safetensors"
assert merge.main(["mix", f"0.5*{lora}", "--out", out + "/half.safetensors"]) == 0
assert merge.main(["fold", "toy/model", lora, out + "/model"]) == 0
from toy.sample import load_networks
load_networks()
"""


def declared(extras: bool = True) -> Iterator[Requirement]:
    groups = [PROJECT["dependencies"], *(EXTRAS.values() if extras else ())]
    for group in groups:
        yield from map(Requirement, group)


def closure(wanted: list[Requirement]) -> dict[str, Distribution]:
    """Name -> every installed distribution that `wanted` ask for, and theirs in turn."""
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {e for n, e in asked if n == name}:
            asked.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue  # of another platform
            further = [Requirement(line) for line in found[name].requires or ()]
            wanted += [
                r for r in further if r.marker is None or r.marker.evaluate({"extra": extra})
            ]
    return found


def plain_environment(folder: Path) -> Path:
    """A Python whose site-packages links to the product's dependencies and theirs, and no more."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    for each in closure(list(declared(extras=False))).values():
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(each.locate_file(name))).resolve())
    return folder / "bin/python"


def test_a_plain_install_trains_draws_and_merges_without_a_word_of_what_it_lacks(
    photos: Path, tmp_path: Path
) -> None:
    python = plain_environment(tmp_path / "plain")
    absent = "from importlib.util import find_spec as f; "
    absent += "print(*(n for n in ('accelerate', 'peft', 'pytest') if f(n)))"
    assert (
        subprocess.run([python, "-c", absent], capture_output=True, text=True, check=True).stdout
        == "\n"
    )
    done = subprocess.run(
        [python, "-c", SESSION, str(tmp_path), str(photos)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(
        r".*(?:accelerate|peft|not installed|not found|pip install|No module).*",
        done.stdout + done.stderr,
    )
    assert not said


@pytest.mark.parametrize(
    ("version", "left"), [("3.10", "whole"), ("3.11", "whole"), ("3.12", "half")]
)
def test_make_installs_with_a_python_that_is_new_enough_and_has_pip(
    tmp_path: Path, version: str, left: str
) -> None:
    """An old python3 is named before torch is fetched; a .venv without pip is completed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    fake = tmp_path / "python"
    numbers = version.replace(".", ", ")
    old = f"import sys; sys.version, sys.version_info = '{version}.1', ({numbers}); "
    old += "exec(sys.argv[1])"
    fake.write_text(f"""#!/bin/sh
echo "$0 $*" >> calls
[ "$1" = -c ] && exec {sys.executable} -c "{old}" "$2"
[ "$2" = venv ] && touch pip
[ "$3" != --version ] || test -e pip
""")
    fake.chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(fake)
    if left == "whole":
        (tmp_path / "pip").touch()
    done = subprocess.run(
        ["make", "ready", f"PYTHON={fake}"], cwd=tmp_path, capture_output=True, text=True
    )
    calls = (tmp_path / "calls").read_text()
    assert ("-m venv .venv" in calls) == (left == "half") and ("pip install" in calls) == (
        done.returncode == 0
    ) == (version != "3.10")
    assert (
        done.returncode == 0
        or ".venv has Python 3.10.1, expected 3.11 or newer: rm -r .venv, then PYTHON=python3.12 "
        "make"
        in done.stderr
    )


# ---------------------------------------------------------------- what is declared


def source_files() -> list[Path]:
    """The Python files of the product and the toy model."""
    files = list(ROOT.glob("*.py"))
    for folder in MODULES:
        files += (ROOT / folder).rglob("*.py")
    return files


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_every_import_is_declared_and_every_dependency_is_imported() -> None:
    ours = {path.stem for path in ROOT.glob("*.py")} | set(MODULES) | set(sys.stdlib_module_names)
    names = set()
    for path in source_files():
        names |= imported(path) if path.name != "backend.py" else set()
    names -= ours
    sources = packages_distributions()
    used = set()
    for name in names:
        found = map(canonicalize_name, sources.get(name, [name]))
        used |= {BROUGHT.get(source, source) for source in found}
    needed = {canonicalize_name(requirement.name) for requirement in declared(extras=False)}
    assert used - OPTIONAL == needed
    extras = set()
    for name in EXTRAS.keys() - {"test"}:
        extras |= {canonicalize_name(Requirement(line).name) for line in EXTRAS[name]}
    assert used & OPTIONAL <= extras
    for name, extra in BROUGHT.items():
        required = map(Requirement, distribution(extra).requires or ())
        assert name in {canonicalize_name(requirement.name) for requirement in required}


@pytest.mark.parametrize("requirement", list(declared()), ids=str)
def test_every_dependency_has_a_lower_bound_that_the_pinned_version_meets(
    requirement: Requirement,
) -> None:
    assert [part.operator for part in requirement.specifier] == [">="]
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    pinned = {
        canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, lines)
    }
    name = canonicalize_name(requirement.name)
    if name not in UNPINNED:
        assert requirement.specifier.contains(pinned[name])


# ---------------------------------------------------------------- in place or not at all


def build(hook: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call a hook of the build backend as pip does, with a folder to write to if it takes one."""
    arguments = [] if hook.startswith("get_requires") else [str(folder)]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import backend; "
    code += f"print(backend.{hook}(*{arguments!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "hook",
    ["get_requires_for_build_wheel", "build_wheel", "get_requires_for_build_sdist", "build_sdist"],
)
def test_a_wheel_or_an_archive_is_refused_with_the_way_that_works(
    hook: str, tmp_path: Path
) -> None:
    done = build(hook, tmp_path)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert len(done.stderr.splitlines()) == 1 and "pip install -e ." in done.stderr


def test_pip_refuses_a_copy_in_site_packages_at_its_first_question(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "backend.py", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "run pip install -e . in it" in done.stdout + done.stderr
    assert not (tmp_path / "site").exists()


def test_no_message_sends_to_a_package_of_our_name() -> None:
    """There is none, and whoever takes the name on PyPI would be installed."""
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *source_files()]:
        assert not re.search(r"pip install\W+(-U )?\W*lora_core", file.read_text()), file
