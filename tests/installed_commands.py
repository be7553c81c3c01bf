"""The installed commands, run as a user types them: by bash, with a folder of them on the PATH."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = "#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"


def install_commands(folder: Path) -> Path:
    """Write each command of pyproject.toml as pip installs it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, entry in scripts.items():
        module, function = entry.split(":")
        text = COMMAND.format(python=sys.executable, module=module, function=function)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def typed_words(
    line: str, cwd: Path, variables: Mapping[str, object] | None = None
) -> list[list[str]]:
    """The words that each command of a line of bash gets, without running it: a stand-in of its
    name writes them down. A test calls the command's function with them, in this process, where
    torch is imported already.
    """
    folder = cwd / "stand-ins"
    install_commands(folder)
    stand_in = '#!/bin/bash\nfor word in "$@"; do printf \'%s\\0\' "$word"; done >> words\n'
    for command in (*folder.iterdir(), folder / "accelerate", folder / "python"):
        command.write_text(stand_in + "printf '\\n\\0' >> words\n")
        command.chmod(0o755)
    (cwd / "words").unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= {name: str(value) for name, value in (variables or {}).items()}
    subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, check=True)
    found: list[list[str]] = [[]]
    for word in (cwd / "words").read_text().split("\0")[:-1]:
        if word == "\n":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


def run_typed(
    line: str, commands: Path, cwd: Path, variables: Mapping[str, object] | None = None
) -> "subprocess.CompletedProcess[str]":
    """The result of a line of bash in a folder, with further environment variables."""
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
        + os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {name: str(value) for name, value in (variables or {}).items()}
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
