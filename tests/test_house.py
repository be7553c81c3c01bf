"""The rules of the house, read from the syntax trees. Each test lists every offender at once."""

import ast
import collections
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lora_core import kernels

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / name for name in ("train.py", "infer.py", "merge.py")]
CORE = sorted((ROOT / "lora_core").rglob("*.py"))
MODELS = sorted((ROOT / "models").rglob("*.py"))
TRAINING = sorted((ROOT / "training").rglob("*.py"))
MERGING = sorted((ROOT / "merging").rglob("*.py"))
PRODUCT = [*CORE, *MODELS, *TRAINING, *MERGING, *SCRIPTS]
OTHERS = []
for folder in ("toy", "benchmarks", "examples"):
    OTHERS += sorted((ROOT / folder).rglob("*.py"))
FAMILIES = re.compile(r"\b(sd|sd1|sd15|sdxl|sd3|flux)\b", re.IGNORECASE)
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
# A reader looks for the tests of a file in tests/test_NAME.py, except for those here.
TESTED_BY = {
    "benchmarks/layer_contenders.py": "test_contenders.py",
    "lora_core/flags/flag_values.py": "test_other_flags.py",
    "lora_core/flags/program_flags.py": "test_other_flags.py",
    "lora_core/flags/script_pages.py": "test_instant_answers.py",
    "lora_core/flags/trainer_flags.py": "test_other_flags.py",
    "lora_core/kernels/flat_steps.py": "test_steps.py",
    "lora_core/kernels/linear_builds.py": "test_ahead.py",
    "lora_core/kernels/linear_kernels.py": "test_linear.py",
    "lora_core/kernels/linear_tables.py": "test_linear.py",
    "lora_core/kernels/linear_tiles.py": "test_linear.py",
    "lora_core/kernels/optimizer_kernels.py": "test_optimizers.py",
    "lora_core/subset_options.py": "test_subsets.py",
    "training/checks/pair_checks.py": "test_pairs.py",
    "training/translation/kohya_data.py": "test_kohya_dataset.py",
    "training/translation/kohya_objective.py": "test_kohya_runs.py",
    "training/translation/kohya_options.py": "test_kohya_runs.py",
    "training/translation/kohya_outputs.py": "test_kohya_prompts.py",
    "training/translation/kohya_steps.py": "test_kohya_dataset.py",
}
THEMES = {  # test files that are named after what cuts across many modules
    "advice", "bad_input", "config_layers", "configs", "corrupt", "damage", "docs", "dropped",
    "example_kinds", "families_load", "family_page", "files_load", "first_machines", "full_disk",
    "fuzz", "house", "installation", "kills", "large_models", "large_sets", "loss_examples",
    "objectives", "packed_turns", "resume", "soak", "toy", "trained_files", "traps", "web_demo",
}  # fmt: skip
HELP_TEXTS = {"config.py", "model_settings.py", "settings.py"}  # files of options
PEERS = {"peft", "prodigyopt", "accelerate", "bitsandbytes", "xformers", "torchvision", "lycoris"}


@cache  # a file is read once for all laws
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return [path for path in map(ROOT.joinpath, listed.split()) if path.exists()]


@cache
def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of every import statement, wherever it stands."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", tuple(alias.name for alias in node.names)))
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name, _ in imports(path)}


def module_name(path: Path) -> str:
    return short(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def modules_used(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, functions' own imports and TYPE_CHECKING included."""
    used = set()
    for name, taken in imports(path):
        below = {f"{name}.{item}" for item in taken} & known
        used |= below or ({name} & known)
    return used - {module_name(path)}


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(each) for each in function.decorator_list)


def code_strings(path: Path) -> Iterator[str]:
    """Names and string constants of the code; docstrings and comments may speak of families."""
    tree = parse(path)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    documents = set()
    for node in ast.walk(tree):
        first = node.body[0] if isinstance(node, documented) and node.body else None
        if isinstance(first, ast.Expr):
            documents.add(id(first.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documents:
                yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def test_core_imports_no_model_library_and_nothing_above_it() -> None:
    above = {"models", "training", "merging", "train", "infer", "merge", "toy", "benchmarks"}
    forbidden = above | {"diffusers", "transformers"}
    offenders = [f"{short(path)}: {sorted(roots(path) & forbidden)}" for path in CORE]
    assert not [line for line in offenders if not line.endswith("[]")]


def test_core_names_no_family() -> None:
    offenders = []
    for path in CORE:
        if path.name not in HELP_TEXTS:  # they give examples
            found = [text for text in code_strings(path) if FAMILIES.search(text)]
            offenders += [f"{short(path)}: {text}" for text in found]
    assert not offenders


def test_wings_know_only_those_below() -> None:
    scripts = {"train", "infer", "merge"}
    rules = [(MODELS, scripts | {"training", "merging"}), (TRAINING, scripts | {"merging"})]
    rules += [(MERGING, scripts | {"training"})]
    offenders = []
    for paths, forbidden in rules:
        for path in paths:
            offenders += [f"{short(path)} -> {name}" for name in roots(path) & forbidden]
    assert not offenders


def test_kernels_and_laws_point_one_way() -> None:
    core, laws = "lora_core.", "lora_core.diffusion."
    rules = {
        "lora_core.kernels": ("adapters", "formats", "optim", "data", "diffusion"),
        "lora_core.adapters.weight_updates": ("formats", "diffusion", "data"),
        "lora_core.diffusion.noise": (
            "diffusion.prediction",
            "diffusion.losses",
            "diffusion.sampling",
        ),
        "lora_core.diffusion.prediction": ("diffusion.losses", "diffusion.sampling"),
    }
    assert laws.startswith(core)
    known = {module_name(path) for path in PRODUCT}
    offenders = []
    for path in CORE:
        for prefix, forbidden in rules.items():
            if module_name(path).startswith(prefix):
                for used in modules_used(path, known):
                    if used.removeprefix(core).startswith(forbidden):
                        offenders.append(f"{short(path)} -> {used}")
    assert not offenders


def test_there_is_no_import_circle() -> None:
    known = {module_name(path) for path in [*PRODUCT, *OTHERS]}
    graph = {module_name(path): modules_used(path, known) for path in [*PRODUCT, *OTHERS]}
    while leaves := [name for name, used in graph.items() if not used & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not {name: sorted(used & graph.keys()) for name, used in graph.items()}


def test_peers_stay_outside_and_diffusers_gives_only_networks() -> None:
    offenders = []
    for path in PRODUCT:
        for name, taken in imports(path):
            if name.split(".")[0] in PEERS:
                offenders.append(f"{short(path)} -> {name}")
            if name.split(".")[0] == "diffusers":
                others = [n for n in taken if not re.search(r"Model$|^Autoencoder|Transformer", n)]
                offenders += [f"{short(path)} -> diffusers.{other}" for other in others]
    assert not offenders


def test_only_the_scripts_read_the_command_line() -> None:
    below = [path for path in PRODUCT if path not in SCRIPTS]
    assert not [short(path) for path in below if "sys.argv" in path.read_text(encoding="utf-8")]


def test_only_training_reads_the_config() -> None:
    readers = {*TRAINING, *SCRIPTS, ROOT / "lora_core/toml.py"}
    offenders = []
    for path in set(PRODUCT) - readers:
        for name, taken in imports(path):
            if name == "lora_core.config" or (name == "lora_core" and "config" in taken):
                offenders.append(short(path))
    assert not offenders


def test_a_file_name_occurs_once() -> None:
    files = collections.defaultdict(list)
    for path in [*PRODUCT, *OTHERS]:
        if path.name != "__init__.py":
            files[path.stem].append(short(path))
    # python -m benchmarks.merge is the name of a command
    allowed = {"merge": ["merge.py", "benchmarks/merge.py"]}
    twice = {stem: paths for stem, paths in files.items() if len(paths) > 1}
    assert {stem: paths for stem, paths in twice.items() if allowed.get(stem) != paths} == {}


def test_tests_mirror_the_source_by_name() -> None:
    folder = ROOT / "tests"
    mirrored = [path for path in [*PRODUCT, *BENCHMARKS] if path.name != "__init__.py"]
    offenders = []
    for path in mirrored:
        wanted = TESTED_BY.get(short(path), f"test_{path.name}")
        if not (folder / wanted).is_file():
            offenders.append(f"{short(path)}: no tests/{wanted}")
    offenders += [f"{name} is no file" for name in TESTED_BY if not (ROOT / name).is_file()]
    known = {path.stem for path in mirrored} | THEMES
    for path in sorted(folder.glob("test_*.py")):
        if path.stem.removeprefix("test_") not in known:
            offenders.append(f"{short(path)} is named after no file and no theme")
    assert not offenders


def test_no_model_brings_code() -> None:
    """transformers and datasets run a repository's Python files unless they are told not to; None,
    their default, asks on the terminal.
    """
    loaders = {"from_pretrained", "load_dataset"}
    offenders = []
    for path in [*PRODUCT, *OTHERS]:
        passed = set()  # handed to load_part, which says it
        nodes = list(ast.walk(parse(path)))
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) == "load_part":
                passed.add(id(node.args[0]))
            says = {k.arg for k in node.keywords if ast.unparse(k.value) == "False"}
            if "trust_remote_code" in says:
                passed.add(id(node.func))
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in loaders and id(node) not in passed:
                offenders.append(f"{short(path)}:{node.lineno}: {ast.unparse(node)}")
    # these classes are diffusers' own, which look for no code
    names = r"UNet2DConditionModel|AutoencoderKL|StableDiffusion(XL)?Pipeline"
    owners = re.compile(rf": ({names})\.from_pretrained$")
    assert not [line for line in offenders if not owners.search(line)]


def test_networks_are_made_by_their_own_classes() -> None:
    """AutoModel.from_config, and AutoConfig, look up classes in a model's own files."""
    auto = re.compile(r"\bAuto(Model|Config|Processor|Pipeline|FeatureExtractor)\w*")
    offenders = [short(path) for path in PRODUCT if auto.search(path.read_text(encoding="utf-8"))]
    assert not offenders


def test_the_loop_is_a_page() -> None:
    sizes = {}
    for node in parse(ROOT / "train.py").body:
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            sizes[node.name] = node.end_lineno - node.lineno + 1
    assert sizes["train"] <= 50
    assert sizes["training_step"] <= 25


def test_files_and_functions_stay_readable() -> None:
    offenders = []
    for path in PRODUCT:
        count = path.read_text(encoding="utf-8").count("\n")
        if count > 500:
            offenders.append(f"{short(path)}: {count} lines")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                # one launch is one function, whatever it takes
                if size > (120 if is_kernel(node) else 60):
                    offenders.append(f"{short(path)}: {node.name}, {size} lines")
    assert not offenders


def test_lines_end_at_100_columns() -> None:
    offenders = []
    for path in tracked("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if len(line) > 100:
                offenders.append(f"{short(path)}:{number}: {len(line)} columns")
    assert not offenders


def test_a_comprehension_has_one_for() -> None:
    comprehensions = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    offenders = []
    for path in tracked("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, comprehensions) and len(node.generators) > 1:
                offenders.append(f"{short(path)}:{node.lineno}")
    assert not offenders


def test_a_kernel_takes_at_most_24_parameters() -> None:
    offenders = []
    for path in tracked("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and is_kernel(node):
                count = len(node.args.args) + len(node.args.kwonlyargs)
                if count > 24:
                    offenders.append(f"{short(path)}: {node.name}, {count} parameters")
    assert not offenders


def test_a_public_name_is_defined_once() -> None:
    """Except what a protocol requires: `load` of a model family, `main` of a command, and the
    implementations of an op, which have its name in every kernel file."""
    protocols = {"main", "load", *kernels.OPS}
    files = collections.defaultdict(list)
    for path in [*PRODUCT, *OTHERS]:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(short(path))
    twice = {name: paths for name, paths in files.items() if len(paths) > 1}
    assert {name: paths for name, paths in twice.items() if name not in protocols} == {}
