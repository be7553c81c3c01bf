"""The rules of the house, read from the syntax tree: who may import whom, and where families are named."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "lora_core").rglob("*.py"))
MODELS = sorted((ROOT / "models").glob("*.py"))
SCRIPTS = [
    ROOT / name
    for name in (
        "train.py",
        "training/setup.py",
        "training/step_inputs.py",
        "training/config_checks.py",
        "training/checkpoints.py",
        "training/results.py",
        "training/nonfinite.py",
        "training/class_images.py",
        "infer.py",
    )
]
MERGE = [ROOT / "merge.py", *sorted((ROOT / "merging").glob("*.py"))]
PRODUCT = [*CORE, *MODELS, *SCRIPTS, *MERGE]
CONFIG_READERS = {path.name for path in SCRIPTS}
FAMILIES = re.compile(r"\b(sd|sd1|sd15|sdxl|sd3|flux)\b", re.IGNORECASE)


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)


def code_strings(path: Path) -> Iterator[str]:
    """Names and string constants of the code; docstrings and comments may speak of families."""
    tree = ast.parse(path.read_text())
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documents
        ):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_core_knows_no_family_and_no_model_library(path: Path) -> None:
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert not roots & {
        "models",
        "diffusers",
        "transformers",
        "merging",
        "toy",
        *(path.stem for path in [*SCRIPTS, *MERGE]),
    }
    if path.name != "config.py":  # its help texts give examples
        assert not [text for text in code_strings(path) if FAMILIES.search(text)]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_product_uses_no_peer_and_diffusers_only_for_networks(path: Path) -> None:
    for name, names in imports(path):
        assert name.split(".")[0] not in {
            "peft",
            "prodigyopt",
            "accelerate",
            "bitsandbytes",
            "xformers",
            "torchvision",
            "lycoris",
        }
        if name.split(".")[0] == "diffusers":
            assert all(re.search(r"Model$|^Autoencoder|Transformer", n) for n in names), names


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_scripts_read_the_config(path: Path) -> None:
    if path.name not in CONFIG_READERS | {"toml.py"}:  # which makes it
        assert not [
            name
            for name, names in imports(path)
            if name == "lora_core.config" or (name == "lora_core" and "config" in names)
        ]


def test_kernels_and_laws_point_one_way() -> None:
    below = {
        "kernels": ("adapters", "formats"),
        "noise": ("prediction", "losses", "sampling"),
        "prediction": ("losses", "sampling"),
        "algebra": ("formats",),
    }
    for stem, forbidden in below.items():
        for path in [p for p in CORE if p.stem == stem or p.parent.name == stem]:
            used = {
                f"{name}.{n}".replace("lora_core.", "")
                for name, names in imports(path)
                for n in (*names, "")
            }
            assert not [u for u in used if u.split(".")[0] in forbidden], path


def test_the_loop_is_a_page() -> None:
    tree = ast.parse((ROOT / "train.py").read_text())
    sizes = {
        node.name: node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    assert sizes["train"] <= 50 and sizes["training_step"] <= 25


def test_files_and_functions_stay_readable() -> None:
    for path in PRODUCT:
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                is_kernel = any(
                    "triton.jit" in ast.unparse(d) for d in node.decorator_list
                )  # one launch is one function, whatever it takes
                assert node.end_lineno - node.lineno < (120 if is_kernel else 60), (
                    f"{path}: {node.name}"
                )
