"""The commands of merge.py: help without torch, and few files and calls for a mix of two files."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge
from merging.commands import COMMANDS, MERGE_METHODS, Keep, KeepOptions, Mix, flatten, unflatten
from merging.ties_dare import MERGES
from models.known import published_layout

ROOT = Path(__file__).parent.parent
MOST_FILES = 35
MOST_CALLS = 20_000
HEAVY = {"torch", "diffusers", "transformers", "numpy"}
LIST_MODULES = """
import json, sys
import merge
try:
    status = merge.main(sys.argv[1:])
finally:
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    print("\\n" + json.dumps({"names": list(sys.modules), "files": files}))
"""


def loaded(*words: str) -> dict[str, list[str]]:
    """Modules of a process of its own that has run a command line."""
    command = [sys.executable, "-c", LIST_MODULES, *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    """Two LoRA files of Stable Diffusion 1.5 with 200 layers each, in kohya's names."""
    folder = tmp_path_factory.mktemp("sd15")
    paths = [str(folder / f"{name}.safetensors") for name in "ab"]
    for seed, path in enumerate(paths):
        save_file(kohya_tensors(torch.Generator().manual_seed(seed)), path)
    return paths


def kohya_tensors(noise: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
    for component, prefix in prefixes.items():
        for path, shape in published_layout("sd1").components[component].shapes.items():
            is_trained = ".attentions." in path or "self_attn" in path or ".mlp." in path
            if len(shape) == 2 and is_trained:
                name = f"{prefix}_{path.replace('.', '_')}"
                down, up = torch.randn(4, shape[1], generator=noise), torch.randn(shape[0], 4)
                tensors[f"{name}.lora_down.weight"] = down.half()
                tensors[f"{name}.lora_up.weight"] = up.half()
                tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_no_torch(command: str) -> None:
    names = loaded(*([command] if command else []), "--help")["names"]
    assert not HEAVY & set(names)


@pytest.mark.parametrize(
    "words", [("merge.py", "-h"), ("merge.py", "mix", "-h"), ("train.py", "-h")]
)
def test_a_reader_of_the_help_may_end_before_it(words: tuple[str, ...]) -> None:
    command = [sys.executable, *words]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    assert (run.wait(), run.stderr.read()) == (0, b"")
    run.stderr.close()


def test_a_mix_of_two_files_imports_few_files_of_ours(pair: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "c.safetensors")
    found = loaded("mix", f"0.7*{pair[0]} + 0.3*{pair[1]}", "--out", out)
    ours = sorted(file for file in found["files"] if is_ours(file))
    assert len(ours) <= MOST_FILES, ours
    assert not {"diffusers", "transformers", "huggingface_hub"} & set(found["names"])


def is_ours(file: str) -> bool:
    """Whether a file is of this project and has code: an __init__.py may be a docstring only."""
    if not file.startswith(f"{ROOT}/") or ".venv" in file:
        return False
    return len(ast.parse(Path(file).read_text()).body) > 1


def test_a_mix_of_two_files_takes_few_python_calls(pair: list[str], tmp_path: Path) -> None:
    """All Python calls from the command line to the written file, once its modules are there."""
    out = str(tmp_path / "c.safetensors")
    words = ["mix", f"0.7*{pair[0]} + 0.3*{pair[1]}", "--overwrite", "--out", out]
    assert merge.main(words) == 0
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        merge.main(words)
    finally:
        sys.setprofile(None)
    assert calls < MOST_CALLS, calls


def test_methods_are_those_that_there_are() -> None:
    assert list(MERGE_METHODS[2:]) == list(MERGES)


def test_options_are_a_flat_table_and_back() -> None:
    options = Mix("a + b", "c", keep=KeepOptions(rank=4))
    flat = flatten(options)
    assert flat["rank"] == 4 and flat["sum"] == "a + b" and "keep" not in flat
    assert unflatten(Mix, flat) == options and unflatten(Mix, {}) == Mix()
    assert options.keep.per_layer() == Keep(rank=4)


def test_a_sum_may_begin_with_a_minus() -> None:
    options = merge.parse_options("mix", ["-a.safetensors + 2*b", "--out", "c"], "merge.py mix")
    assert options.sum == "-a.safetensors + 2*b"
