"""Every code block of the README and of docs/ runs in a folder with photos, a run and LoRA files.

bash: each command, with one training step; commands that need the hub, the reader's runs or minutes
are parsed and not run.
python: the blocks of a page share one namespace. toml: a valid config. text: not code.
"""

import ast
import glob
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

import infer
import merge
import train
from benchmarks import loss_lab
from lora_core import report
from lora_core.config import Config
from lora_core.flags.command_line import parse_command_line, take_flag
from lora_core.toml import read_toml, to_toml
from tests.process_groups import ProcessGroups, process_groups
from tests.test_kohya_command import LINE
from training.checks import config_checks
from training.comparisons.compare_options import CompareRuns
from training.comparisons.measures import find_measures
from training.inputs.prepared_files import split_prepare_words
from training.run_presets import take_preset
from training.translation.kohya_command import DATASET, FROM_KOHYA, WRITE_CONFIG

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
FEW = ["--rounds", "1", "--shape", "32,16,16", "--threads", "1"]  # of a benchmark
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}|\bRUN_A\b")  # a word for what a user has
HUB = re.compile(r"(stable-diffusion-v1-5|stabilityai|fal)/")  # models that are downloaded
TOY = "toy/model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the repository's folders, and photos/, runs/demo, a, b and 'my style'."""
    folder = tmp_path_factory.mktemp("docs")
    for path in ROOT.iterdir():
        if path.name not in {"runs", "photos", ".git", ".venv", "docs"}:
            (folder / path.name).symlink_to(path)
    (folder / "docs").mkdir()
    (folder / "photos").mkdir()
    for name in ("00.png", "00.txt", "01.png", "01.txt"):
        shutil.copy(ROOT / "toy/concepts/zib" / name, folder / "photos")
    for name in ("00.png", "01.png"):
        (folder / "winners").mkdir(exist_ok=True)
        (folder / "losers").mkdir(exist_ok=True)
        shutil.copy(ROOT / "toy/concepts/zib" / name, folder / "winners")
        with Image.open(ROOT / "toy/concepts/zib" / name) as drawing:
            ImageOps.invert(drawing.convert("RGB")).save(folder / "losers" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = read_toml(Path("configs/toy_pti.toml"))
        train.train(shorten(replace(config, out="runs/demo")))
        shutil.copytree("runs/demo", "runs/trilo")
        Path("ten").mkdir()
        for name in ("zib_0", "zib_1", "trilo_0", "ink_0"):
            shutil.copy("runs/demo/demo.safetensors", f"ten/{name}.safetensors")
    for seed, name in enumerate(("a", "b", "my style")):
        save_sd1_lora(folder / f"{name}.safetensors", seed)
    return folder


@pytest.fixture(scope="module")
def groups(folder: Path) -> Iterator[ProcessGroups]:
    with process_groups(folder, cwd=folder) as started:
        yield started


def save_sd1_lora(file: Path, seed: int, rank: int = 4) -> None:
    """A file in diffusers' format on some attention layers of Stable Diffusion 1.5."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block, width in (("down_blocks.0", 320), ("up_blocks.1", 1280)):
        for name, width_in in (("attn1.to_q", width), ("attn2.to_k", 768)):
            path = f"unet.{block}.attentions.0.transformer_blocks.0.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, width_in, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    save_file(tensors, file)


def shorten(config: Config) -> Config:
    """The same config with one step a stage, one image and no validation."""
    stages = tuple(replace(stage, steps=1) for stage in config.stages)
    prompts = (*config.samples.prompts, "a photo")[:1]
    samples = replace(config.samples, steps=1, guidance=1.0, prompts=prompts)
    validation = replace(config.validation, every=-1)
    return replace(config, stages=stages, samples=samples, validation=validation, device="cpu")


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for command in shlex.join(words).replace("'&&'", "\n").splitlines():
            if command.strip():
                yield command.strip()


def run_command(command: str, groups: ProcessGroups) -> None:
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"]:
        if "--preview-density" in words or "--plan" in words:
            assert train.main(words[2:]) == 0
            return
        if "--compare" in words:  # of runs that a reader has
            asked = parse_command_line(CompareRuns, words[2:], prog="train.py", example="")
            assert asked.compare
            for metrics in asked.metric:
                assert find_measures(metrics, asked.metric_arg)
            return
        if words[2] == "--list":
            assert train.main(words[2:]) == 0
            return
        if words[2] == FROM_KOHYA:  # of a file that a reader has
            config = parse_command_line(
                Config, drop_kohya_files(words[2:]), prog="train.py", example=""
            )
            return
        words, annotators = split_prepare_words(words[2:])
        preset, words = take_local_preset(words)
        config = parse_command_line(Config, words, prog="train.py", example="", preset=preset)
        if annotators is None and not HUB.match(config.model):
            # two pages train to one folder
            train.train(replace(shorten(config), overwrite=not config.resume))
    elif words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.training_script == "train.py"
        config = parse_command_line(
            Config, launched.training_script_args, prog="train.py", example=""
        )
        if launched.nnodes == "1:1":
            train_in_processes(
                groups, replace(shorten(config), overwrite=True), launched.nproc_per_node
            )
    elif words[:2] == ["python", "infer.py"]:
        more = [] if words[2] == "--list" else ["--steps", "1", "--device", "cpu"]
        if HUB.search(command):
            assert infer.parse_arguments(words[2:]).prompt
        else:
            assert infer.main([*words[2:], *more]) == 0
    elif words[:2] == ["python", "merge.py"]:
        more = [] if words[2] in ("info", "diff", "explain") else ["--overwrite"]
        if words[2] == "fuse" and "sum" not in words:
            more += ["--steps", "1"]
        assert merge.main([*expand_patterns(words[2:]), *more]) == 0
    elif words[:3] == ["python", "-m", "lora_core.report"]:
        assert report.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "benchmarks.loss_lab"]:  # minutes
        assert len(loss_lab.plan_lab(words[3:]).runs) > 1
    elif words[:2] == ["python", "-m"]:
        assert importlib.import_module(words[2]).main([*words[3:], *FEW]) == 0
    elif words[1:] == ["examples/web_demo.py"]:  # it serves until it is stopped: test_web_demo.py
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "accelerate":  # test_kohya_command.py runs it
        assert tuple(words[1:]) == LINE
    elif words[0] == "cp":
        shutil.copy(words[1], words[2])
    else:
        assert words[:2] == ["git", "clone"] or words[0] in ("cd", "source"), command


def expand_patterns(words: list[str]) -> list[str]:
    """The words with the files that they match, as a shell gives them."""
    found = [sorted(glob.glob(word)) or [word] for word in words]
    return list(itertools.chain.from_iterable(found))


def take_local_preset(words: list[str]) -> tuple[Path | None, list[str]]:
    """The preset's file and the other words; the model of the hub in them is Stable Diffusion's."""
    model, others = take_flag("model", words)
    is_remote = "--preset" in words and model and HUB.match(model)
    preset, rest = take_preset([*others, "--model", TOY] if is_remote else words)
    return preset, [*rest, "--model", str(model)] if is_remote else rest


def drop_kohya_files(words: list[str]) -> list[str]:
    """The words without the options of --from-kohya, each with its file."""
    own: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in (FROM_KOHYA, DATASET, WRITE_CONFIG):
            assert Path(next(rest)).suffix == ".toml"
        else:
            own.append(word)
    return own


def train_in_processes(groups: ProcessGroups, config: Config, count: str) -> None:
    """Train in as many processes, without pictures of the end."""
    folder = Path(config.out).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "launched.toml"
    file.write_text(to_toml(replace(config, out=str(Path(config.out).absolute()))))
    ended = groups.train(int(count), [str(file), "--overwrite"])
    assert ended.status == [0] * int(count), "\n".join(ended.output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(
    page: Path,
    folder: Path,
    groups: ProcessGroups,
    without_plots: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "page"}
    for language, code in blocks(page):
        assert language in {"bash", "python", "toml", "text", "mermaid"}, (
            f"{page.name}: {code[:80]}"
        )
        if language == "python":
            exec(compile(code, f"{page.name}", "exec"), namespace)
        elif language == "toml":
            tomllib.loads(code)
            Path("page.toml").write_text(code)
            read_toml(Path("page.toml"))
        elif language == "bash":
            for command in commands(code):
                run_command(command, groups)


@pytest.mark.parametrize("script", [train, infer, merge], ids=lambda script: script.__name__)
def test_examples_of_the_scripts_run(
    script: ModuleType,
    folder: Path,
    groups: ProcessGroups,
    without_plots: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    text = (script.__doc__ or "") + "\n" + getattr(script, "EXAMPLE", "")
    lines = re.findall(r"^ *(python .*)$", text.replace("\\\n", " "), re.MULTILINE)
    runnable = [line for line in lines if not PLACEHOLDER.search(line)]
    assert len(runnable) >= 2, lines
    for command in commands("\n".join(runnable)):
        run_command(command, groups)


def test_an_example_has_forty_lines_and_commands_that_are_understood() -> None:
    for file in EXAMPLES:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert text.count("\n") <= (199 if file.name == "web_demo.py" else 40), file.name
        doc = ast.get_docstring(tree) or ""
        known = {getattr(node, "name", "") for node in tree.body}
        assert set(re.findall(rf"examples/{file.name}:(\w+)", doc)) <= known, file.name
        found = re.findall(
            r"^ *(?:LORA_CANDIDATE=\S+ )?(python .*)$", doc.replace("\\\n", " "), re.M
        )
        assert found or f"python examples/{file.name}" in doc, file.name
        for command in commands("\n".join(found)):
            words = shlex.split(command)
            assert (ROOT / words[1]).is_file() or words[1] == "-m", command
            if words[1] == "train.py":
                parse_command_line(Config, words[2:], prog="train.py", example="")


def test_the_example_patches_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    text = (ROOT / "examples" / "patch_model.py").read_text(encoding="utf-8")
    exec(
        compile(
            text.replace("SamplerSettings()", "SamplerSettings(steps=1)"), "patch_model", "exec"
        ),
        {},
    )
    with Image.open("patched.png") as image:
        assert image.size == (64, 64)


def test_the_options_in_the_first_table_of_scaling_go_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    table = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split("\n\n")[1]
    found = [shlex.split(text) for text in re.findall(r"`(-[^`]+|[^`]+train.py[^`]+)`", table)]
    assert len(found) > 8
    for words in found:
        given = words[words.index("train.py") + 2 :] if "train.py" in words else words
        given = ["configs/toy_pti.toml", *(word for word in given if word != "--plan")]
        config = parse_command_line(Config, given, prog="train.py", example="")
        config_checks.check_config(replace(config, resume=False), needs_images=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor[1:] in slugs, f"{page.name}: {target}{anchor}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000
