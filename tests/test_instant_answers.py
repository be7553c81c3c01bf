"""What scripts answer before torch is imported: their page, help, versions, completion of a shell,
and flags of other tools.
"""

import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import infer
import merge
import train
from lora_core.flags.instant_answers import describe_versions
from tests.test_command_line import HEAVY, run_fresh

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train.py": train, "infer.py": infer, "merge.py": merge}
COMMANDS = {"lora-train": train, "lora-infer": infer, "lora-merge": merge}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "status"), [((), 2), (("--help",), 0), (("--version",), 0), (("--models", "a"), 2)]
)
def test_an_instant_answer_imports_no_torch(
    script: str, words: tuple[str, ...], status: int
) -> None:
    if words == ("--models", "a") and script != "merge.py":
        words = ("--scale", "7") if script == "infer.py" else ("--network_dim", "8")
    assert run_fresh(script, *words) == f"status {status} imported"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_fits_a_screen_and_says_where_to_go_on(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SCRIPTS[script].main([]) == 2
    page = capsys.readouterr().out.splitlines()
    assert len(page) <= 24 and max(map(len, page)) <= 100
    assert sum(line.startswith(f"  python {script}") for line in page) >= 3
    wanted = {"--help", "--version", "--tyro-print-completion"}
    if script == "train.py":
        wanted |= {"--list", "--plan", "--compare"}
    assert all(any(flag in line for line in page) for flag in wanted)


def example_lines(script: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The words of each line of a script's page that begins with python, remarks left out."""
    assert SCRIPTS[script].main([]) == 2
    page = capsys.readouterr().out.replace("\\\n", " ").splitlines()
    lines = [line.strip() for line in page if line.startswith("  python ")]
    found = []
    for line in lines:
        words = shlex.split(re.split(r" {3}|  (?=the )", re.sub(r" {2,}--", " --", line))[0])
        assert words[:2] == ["python", script]
        found.append(words[2:])
    return found


def test_the_lines_of_the_pages_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder where the reader's own files are, in short, in the order of the pages."""
    (tmp_path / "toy").symlink_to(ROOT / "toy")
    (tmp_path / "FILE.txt").write_text("a photo of TOK\na TOK\n")
    config = (ROOT / "configs/toy_pti.toml").read_text().replace("runs/demo", "runs/config")
    short = config.replace("steps = 100", "steps = 1").replace("steps = 200", "steps = 1")
    (tmp_path / "photos").mkdir()
    for file in (ROOT / "toy/concepts/zib").glob("*.png"):
        shutil.copy(file, tmp_path / "photos")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/toy_pti.toml").write_text(short.replace("steps = 25", "steps = 1"))
    monkeypatch.chdir(tmp_path)
    first = ["--data.resolution", "64", "--samples.steps", "1"]
    first += ["--stages.0.steps", "1", "--stages.1.steps", "1", "--precision", "fp32"]
    examples = ROOT / "examples/kohya/lora_example_training_data"
    kohya = (examples / "train_network_config.toml").read_text().replace("../../", "")
    kohya = kohya.replace("lora_example_training_data/prompts.txt", "FILE.txt")
    (tmp_path / "train_network_config.toml").write_text(kohya)
    dataset = (examples / "dataset_config.toml").read_text().replace("../../", "")
    (tmp_path / "dataset.toml").write_text(dataset)
    own = {"MODEL": "toy/model", "FOLDER": "photos", "CONFIG.toml": "runs/config/config.toml"}
    own |= {"200": "1", "RUN_A": "runs/mine", "RUN_B": "runs/demo"}
    for script, program in SCRIPTS.items():
        for number, line in enumerate(example_lines(script, capsys)):
            words = [own.get(word, word) for word in line]
            if script == "train.py" and number == 0:
                words += first
            if "--from-kohya" in words:
                words += ["--write-config", "kohya.toml"]
            if script == "infer.py" and "--list" not in words:
                words += ["--steps", "1"]
            if "--compare" in words:
                shutil.copytree("runs/mine", "runs/demo")
            assert program.main(words) == 0, (words, capsys.readouterr().err)
            if script == "infer.py" and number == 0:
                for name in "ab":
                    shutil.copy("runs/mine/pytorch_lora_weights.safetensors", f"{name}.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_version_is_one_line(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPTS[script].main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said == describe_versions() + "\n"
    for name in ("lora_core", "torch", "diffusers", "transformers"):
        assert f"{name} {metadata.version(name)}" in said


def test_a_clone_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def lose_ours(name: str) -> str:
        if name == "lora_core":
            raise metadata.PackageNotFoundError
        return real(name)

    installed = describe_versions()
    monkeypatch.setattr(metadata, "version", lose_ours)
    assert describe_versions() == installed


@pytest.mark.parametrize("command", COMMANDS)
def test_an_installed_command_answers_before_torch(command: str, tmp_path: Path) -> None:
    """pip writes a file that imports the script's main and calls it."""
    module = command.removeprefix("lora-")
    file = tmp_path / command
    file.write_text(
        "import sys\n"
        "try:\n"
        f"    from {module} import main\n"
        "    sys.exit(main())\n"
        "finally:\n"
        f"    print('imported', *sorted({set(HEAVY)!r} & sys.modules.keys()))\n"
    )
    line = [sys.executable, str(file), "--version"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [describe_versions(), "imported"]


# ---------------------------------------------------------------- completion

TRIES = [  # words, the last of which is completed -> some of the completions
    ("lora-train", ["--optimizer.l"], {"--optimizer.lr", "--optimizer.lora-plus"}),
    ("lora-train", ["configs/toy_pti.toml", "--adapter.ran"], {"--adapter.rank"}),
    ("lora-train", ["--precision", "b"], {"bf16"}),
    ("lora-infer", ["--model", "m", "--gri"], {"--grid"}),
    ("lora-merge", ["fo"], {"fold"}),
    ("lora-merge", ["mix", "--densi"], {"--density"}),
    ("lora-merge", ["convert", "a.safetensors", "--to", "koh"], {"kohya"}),
]


def completion_file(command: str, shell: str, folder: Path) -> Path:
    line = [sys.executable, f"{command.removeprefix('lora-')}.py", "--tyro-print-completion", shell]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    file = folder / f"_{command}"
    file.write_text(done.stdout)
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_completes_flags_choices_and_files(command: str, tmp_path: Path) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("there is no bash")
    file = completion_file(command, "bash", tmp_path)
    assert not subprocess.run([bash, "-n", file], capture_output=True, text=True).stderr
    lines = [f"source {file}", f"complete -p {command}"]
    tries = [each for each in TRIES if each[0] == command] + [(command, ["configs/toy_pt"], set())]
    for _, words, _ in tries:
        quoted = " ".join(f"'{word}'" for word in (command, *words))
        name = command.replace("-", "_")
        lines.append(f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; COMPREPLY=()")
        lines.append(f'_{name}_or_files; echo "found ${{COMPREPLY[*]}}"')
    done = subprocess.run([bash, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    registered, *found = done.stdout.splitlines()
    assert "-o default" in registered  # the names of files, where nothing is found
    for (_, words, wanted), line in zip(tries, found, strict=True):
        completions = set(line.removeprefix("found ").split())
        assert wanted <= completions if wanted else not completions, words


@pytest.mark.parametrize("command", COMMANDS)
def test_zsh_reads_its_completion(command: str, tmp_path: Path) -> None:
    if not (zsh := shutil.which("zsh")):
        pytest.skip("there is no zsh")
    file = completion_file(command, "zsh", tmp_path)
    assert file.read_text().startswith(f"#compdef {command}\n")
    assert not subprocess.run([zsh, "-n", file], capture_output=True, text=True).stderr


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--tyro-print-completion", "powershell"]) == 2
    assert "expected bash or zsh" in capsys.readouterr().err
